"""Registering with a library that has not been imported, without importing it.

transformers has no entry points: a quantizer is registered by importing `transformers.quantizers`, and with it torch,
which takes seconds. So a stand-in takes that module's name; it makes way when something of the module is asked for.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """A module's place in `sys.modules`, until an import takes a name from it: then the module itself is imported."""

    def __init__(self, name: str, then: str):
        super().__init__(name)
        self._then = then

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks through all modules is not in need of this one
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = import_module(self.__name__)
        import_module(self._then)
        return getattr(module, name)


def register(module: str, then: str) -> None:
    """Imports `then` as soon as `module` has been imported: now, if it has been, or is not where it is known to be."""
    package, *path = module.split(".")
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    if module in sys.modules or not any(Path(place, *path).with_suffix(".py").exists() for place in places):
        import_module(then)
    else:
        sys.modules[module] = StandIn(module, then)
