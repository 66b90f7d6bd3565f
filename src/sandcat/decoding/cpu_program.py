"""The program of a step on a CPU: the records that one compiled call runs, cut where a module is called."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from sandcat.layers.step_parts import Kept, Linear
from sandcat.ops.numba.primitives.dtypes import unit_of
from sandcat.ops.numba.step.linears import is_summed
from sandcat.ops.numba.step.step import OP
from sandcat.ops.weights import FORMATS


class Call(NamedTuple):
    """A module that is called between records: `taken` = module(`given`)."""

    module: nn.Module
    given: Tensor
    taken: Tensor


class Run(NamedTuple):
    """Records that one compiled call runs: the address of the first one, how many there are, and what is called
    then."""

    first: int
    records: int
    call: Call | None


class Program:
    """Records with their operands, and all that these name by address.

    Args:
        threads: that it will run on.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self.records: list[tuple[int, int]] = []
        self.calls: list[tuple[int, Call]] = []
        """Modules, with how many records stand before them."""
        self.formats: set[str] = set()
        """Of the weights."""
        self.held: list[Tensor] = []
        self.pages: list = []
        self.operands: list[np.ndarray] = []

    def add(self, code: int, kind: np.dtype | None = None, **values: Tensor | float | None) -> Any:
        """Adds a record; its operand, of which nested ones are to be filled yet."""
        if kind is None:
            self.records.append((code, 0))
            return None
        operand = np.zeros(1, kind)
        self.operands.append(operand)
        self.records.append((code, operand.ctypes.data))
        self.fill(operand[0], **values)
        return operand[0]

    def fill(self, entry: np.void, **values: Tensor | float | None) -> None:
        """Writes numbers as they are, tensors as their addresses (and keeps them), None as 0."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().contiguous()  # a weight may be stored anew while this memory is still read
                self.held.append(value)
                value = value.data_ptr()
            entry[name] = 0 if value is None else value

    def fill_linear(self, entry: np.void, part: Linear, *, packed: bool = False, skips: bool = False) -> None:
        """
        Args:
            packed, skips: its weight lies by inputs; inputs that are 0, as a part before it dropped them, are skipped.
        """
        kept: Kept | None = getattr(part, "kept", None)
        codes, scale, _, bias, format = part.stored
        if kept is not None:
            packed, skips = kept.packed, kept.skips
        rows = codes.t() if packed else codes
        self.formats.add(format)
        self.fill(
            entry, weight=rows, format=FORMATS[format].code, unit=unit_of(format), scale=scale, bias=bias,
            by_inputs=packed, skips=skips, masks=kept is not None and not skips,
            summed=is_summed(packed, skips, part.outputs * rows.itemsize, self.threads),
            threshold=kept and kept.threshold, shared=kept is not None and kept.shared, outputs=part.outputs,
            inputs=part.inputs,
        )  # fmt: skip

    def fill_matrix(self, entry: np.void, matrix_OI: Tensor) -> None:
        """A dense product with a matrix in the model's dtype."""
        outputs, inputs = matrix_OI.shape
        self.fill(entry, weight=matrix_OI, unit=1, outputs=outputs, inputs=inputs)

    def call(self, module: nn.Module, given: Tensor, taken: Tensor) -> None:
        """Cuts the program for a module."""
        self.calls.append((len(self.records), Call(module, given, taken)))

    def finished(self) -> tuple[np.ndarray, list[Run]]:
        """All records, and the runs of them."""
        program = np.array(self.records, dtype=OP)
        first, starts = program.ctypes.data, [0, *(end for end, _ in self.calls)]
        ends = [*self.calls, (len(self.records), None)]
        return program, [
            Run(first + start * OP.itemsize, end - start, call) for start, (end, call) in zip(starts, ends, strict=True)
        ]
