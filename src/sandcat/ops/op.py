"""Ops of torch that take matrices as they lie (`Stored`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from sandcat.ops.gradients import differentiable
from sandcat.ops.weights import FORMATS, Stored

_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", float: "float", int: "int", bool: "bool"}
_FIELDS = {name: _KINDS[hint] for name, hint in get_type_hints(Stored).items()}


class Op:
    """An op that is defined by its reference, and run by the kernel of the device where there is one.

    A schema of torch knows tensors and scalars alone, so `flat` makes five arguments of each `Stored`; kernels, and
    what `register_fake` takes, get them whole again. It has the gradients of its reference where that is asked for.

    Args:
        floats: there are kernels for matrices that are stored as numbers of the activations' dtype.
    """

    def __init__(self, name: str, reference: Callable[..., Tensor], *, floats: bool = True, gradients: bool = True):
        hints = get_type_hints(reference)
        self.name, self.reference, self.floats = name, reference, floats
        self.stored = [hints[parameter] is Stored for parameter in inspect.signature(reference).parameters]
        fields: list[str] = []
        for parameter in inspect.signature(reference).parameters:
            if hints[parameter] is Stored:
                fields += [f"{kind} {parameter}_{field}" for field, kind in _FIELDS.items()]
            else:
                fields.append(f"{_KINDS[hints[parameter]]} {parameter}")
        self.definition = self._of_whole(reference)
        self.op = torch.library.custom_op(
            f"sandcat::{name}", self.definition, mutates_args=(), schema=f"({', '.join(fields)}) -> Tensor"
        )
        if gradients:
            differentiable(self.op, self.definition)

    def __call__(self, *args: Any) -> Tensor:
        return self.op(*self.flat(*args))

    def flat(self, *args: Any) -> tuple:
        """The arguments as the op of torch takes them.

        Raises:
            ValueError: scales that a matrix's format has not, or lacks.
        """
        found: list[Any] = []
        for arg in args:
            if isinstance(arg, Stored):
                arg.check(f"sandcat::{self.name}: a matrix")
                found += arg
            else:
                found.append(arg)
        return tuple(found)

    def whole(self, args: tuple) -> list[Any]:
        """The arguments as they were before `flat`."""
        found, at = [], 0
        for stored in self.stored:
            size = len(_FIELDS) if stored else 1
            found.append(Stored(*args[at : at + size]) if stored else args[at])
            at += size
        return found

    def reads(self, device: str, format: str) -> bool:
        """Whether kernels for such a device, where there are any, read matrices that are stored so."""
        return device in FORMATS[format].devices and (self.floats or FORMATS[format].codes is not None)

    def register_fake(self, fake: Callable[..., Tensor]) -> None:
        self.op.register_fake(self._of_whole(fake))

    def register_kernel(self, device: str) -> Callable[[Callable], Callable]:
        """Where it does not read the format of a matrix, the reference runs."""

        def register(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any) -> Tensor:
                found = self.whole(args)
                reads = all(self.reads(device, arg.format) for arg in found if isinstance(arg, Stored))
                return kernel(*found) if reads else self.reference(*found)

            self.op.register_kernel(device)(run)
            return kernel

        return register

    def _of_whole(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: function(*self.whole(args))
