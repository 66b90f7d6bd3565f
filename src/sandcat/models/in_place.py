"""A method of one model alone, in the place of its class's."""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from sandcat.errors import SandcatError


class InPlace(ABC):
    """Stands in the place of a model's method of that name, as an attribute of the model, and calls it.

    It does not keep the model alive, follows it into a copy, and can be pickled with it.

    Args:
        model: whose method this becomes, by `setattr(model, kind.name, kind(model, ...))`.
        own: what else the subclass is made of, which copies and pickles carry along.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, *own: Any):
        self._model, self._own = weakref.ref(model), own

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise SandcatError(f"the model whose {self.name} this is is gone: keep it, not the method alone.")
        return model

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method of the model's class: its signature and its help are this one's."""
        return getattr(type(self.model), self.name).__get__(self.model)

    def __deepcopy__(self, memo: dict) -> InPlace:
        model = self.model
        return type(self)(memo.get(id(model), model), *copy.deepcopy(self._own, memo))

    def __reduce__(self) -> tuple:
        return type(self), (self.model, *self._own)

    @abstractmethod
    def __call__(self, *args, **kwargs) -> Any: ...
