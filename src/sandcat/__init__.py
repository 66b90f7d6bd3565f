"""sandcat: a pretrained language model that reads, for each token, only the weights it needs.

Importing it takes a moment, not the seconds of torch and transformers: a name below is imported when it is asked for,
and transformers is told of plans when it first asks which quantizers there are.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sandcat.support import lazy_import
from sandcat.version import __version__ as __version__

if TYPE_CHECKING:
    from sandcat.checkpoints.load import load
    from sandcat.checkpoints.save import save
    from sandcat.errors import SandcatError
    from sandcat.method import Method
    from sandcat.methods import METHODS
    from sandcat.pipeline import sparsify
    from sandcat.plans.plan import Plan
    from sandcat.plans.recipe import parse
    from sandcat.sweeps.sweep import sweep

__all__ = ["METHODS", "Method", "Plan", "SandcatError", "load", "parse", "save", "sparsify", "sweep"]

_HOMES = {
    "METHODS": "methods", "Method": "method", "Plan": "plans.plan", "SandcatError": "errors",
    "load": "checkpoints.load", "parse": "plans.recipe", "save": "checkpoints.save", "sparsify": "pipeline",
    "sweep": "sweeps.sweep",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sandcat' has no attribute {name!r}")
    return getattr(import_module(f"sandcat.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


lazy_import.register("transformers.quantizers.auto", "sandcat.checkpoints.quantizer")
