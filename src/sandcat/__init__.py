"""sandcat: a pretrained language model that reads, for each token, only the weights it needs.

Importing it takes a moment, not the seconds of torch and transformers: a name below is imported when it is asked for,
and transformers is told of plans when it first asks which quantizers there are.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sandcat import awaited

if TYPE_CHECKING:
    from sandcat.errors import SandcatError
    from sandcat.hub import load
    from sandcat.method import Method
    from sandcat.methods import METHODS
    from sandcat.plan import Plan, parse
    from sandcat.saving import save
    from sandcat.sparsifying import sparsify
    from sandcat.sweeping import sweep

__version__ = "0.1.0"

__all__ = ["METHODS", "Method", "Plan", "SandcatError", "load", "parse", "save", "sparsify", "sweep"]

_HOMES = {
    "METHODS": "methods", "Method": "method", "Plan": "plan", "SandcatError": "errors", "load": "hub", "parse": "plan",
    "save": "saving", "sparsify": "sparsifying", "sweep": "sweeping",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sandcat' has no attribute {name!r}")
    return getattr(import_module(f"sandcat.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


awaited.register("transformers.quantizers.auto", "sandcat.registration")
