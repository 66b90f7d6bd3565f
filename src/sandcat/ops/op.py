"""Ops of torch that take named tuples: matrices as they lie (`Stored`), pages."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from sandcat.ops.gradients import differentiable
from sandcat.ops.weights import FORMATS, Stored

_KINDS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", Sequence[Tensor]: "Tensor[]", str: "str", float: "float", int: "int",
    bool: "bool", float | None: "float?", int | None: "int?", type(None): "()",
}  # fmt: skip


class Op:
    """An op that is defined by its reference, and run by the kernel of the device where there is one.

    A schema of torch knows tensors and scalars alone, so `flat` makes an argument of each field of a named tuple;
    kernels, and what `register_fake` takes, get them whole again. It has the gradients of its reference where that is
    asked for.

    Args:
        floats: there are kernels for matrices that are stored as numbers of the activations' dtype.
        mutates: what it writes: fields, as the tuple's parameter and theirs, joined by "_".
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        floats: bool = True,
        gradients: bool = True,
        mutates: tuple[str, ...] = (),
    ):
        hints = get_type_hints(reference)
        self.name, self.reference, self.floats = name, reference, floats
        parameters = list(inspect.signature(reference).parameters)
        self.tuples = [hints[name] if hasattr(hints[name], "_fields") else None for name in parameters]
        kinds: dict[str, str] = {}
        for parameter, tuple_type in zip(parameters, self.tuples, strict=True):
            fields = {parameter: hints[parameter]}
            if tuple_type is not None:
                fields = {f"{parameter}_{field}": hint for field, hint in get_type_hints(tuple_type).items()}
            kinds |= {field: _KINDS[hint] for field, hint in fields.items()}
        for number, field in enumerate(mutates):
            kinds[field] = kinds[field].replace("Tensor", f"Tensor(a{number}!)")
        schema = f"({', '.join(f'{kind} {field}' for field, kind in kinds.items())}) -> {_KINDS[hints['return']]}"
        self.definition = self._of_whole(reference)
        self.op = torch.library.custom_op(f"sandcat::{name}", self.definition, mutates_args=mutates, schema=schema)
        if gradients:
            differentiable(self.op, self.definition)

    def __call__(self, *args: Any) -> Any:
        return self.op(*self.flat(*args))

    def flat(self, *args: Any) -> tuple:
        """The arguments as the op of torch takes them.

        Raises:
            ValueError: scales that a matrix's format has not, or lacks.
        """
        found: list[Any] = []
        for arg, tuple_type in zip(args, self.tuples, strict=True):
            if isinstance(arg, Stored):
                arg.check(f"sandcat::{self.name}: a matrix")
            if tuple_type is None:
                found.append(arg)
            else:
                found.extend([*arg])  # not +=, which torch.compile 2.11 does not trace for named tuples
        return tuple(found)

    def whole(self, args: tuple) -> list[Any]:
        """The arguments as they were before `flat`."""
        found, at = [], 0
        for tuple_type in self.tuples:
            size = 1 if tuple_type is None else len(tuple_type._fields)
            found.append(args[at] if tuple_type is None else tuple_type(*args[at : at + size]))
            at += size
        return found

    def reads(self, device: str, format: str) -> bool:
        """Whether kernels for such a device, where there are any, read matrices that are stored so."""
        return device in FORMATS[format].devices and (self.floats or FORMATS[format].codes is not None)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """What gives a result's shape and dtype, to PyTorch's compiler; it gets what the op is called with."""
        self.op.register_fake(self._of_whole(fake))

    def register_kernel(self, device: str) -> Callable[[Callable], Callable]:
        """Where it does not read the format of a matrix, the reference runs."""

        def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                found = self.whole(args)
                reads = all(self.reads(device, arg.format) for arg in found if isinstance(arg, Stored))
                return kernel(*found) if reads else self.reference(*found)

            self.op.register_kernel(device)(run)
            return kernel

        return register

    def _of_whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*self.whole(args))
