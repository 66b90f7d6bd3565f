"""The program of a step on a CPU: the records that one compiled call runs, cut where a module is called."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sandcat.layers.step_parts import Kept, Linear
from sandcat.ops.numba.primitives.matrices import matrix
from sandcat.ops.numba.primitives.memory import fill
from sandcat.ops.numba.step.linears import is_summed
from sandcat.ops.numba.step.operations import operation
from sandcat.ops.numba.step.records import OP


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
        dtype: of the model.
        tiles: products are those of the processor's matrix unit.
    """

    def __init__(self, threads: int, dtype: torch.dtype, *, tiles: bool):
        self.threads, self.dtype, self.tiles = threads, dtype, tiles
        self.records: list[tuple[int, int]] = []
        self.calls: list[tuple[int, Call]] = []
        """Modules, with how many records stand before them."""
        self.held: list[Tensor] = []
        self.pages: list = []
        self.operands: list[np.ndarray] = []

    def add(self, code: int, kind: np.dtype | None = None, **values: Tensor | float | None) -> Any:
        """Adds a record; its operand, of which nested ones are to be filled yet."""
        function = operation(code, self.dtype)
        if kind is None:
            self.records.append((function, 0))
            return None
        operand = np.zeros(1, kind)
        self.operands.append(operand)
        self.records.append((function, operand.ctypes.data))
        self.fill(operand[0], **values)
        return operand[0]

    def fill(self, entry: np.void, **values: Any) -> None:
        """As `memory.fill`; a weight may be stored anew while what it was is still read."""
        self.held += fill(entry, **values)

    def fill_linear(
        self, entry: np.void, part: Linear, *, packed: bool = False, skips: bool = False, listed: bool = False,
        sums_at: int = 0,
    ) -> None:  # fmt: skip
        """
        Args:
            packed, skips: its weight lies by inputs; inputs that are 0, as a part before it dropped them, are skipped.
            listed: some of its outputs are computed, not all.
            sums_at: where threads have its sums, if they have sums.
        """
        kept: Kept | None = getattr(part, "kept", None)
        if kept is not None:
            packed, skips = kept.packed, kept.skips
        self.fill(
            entry, **matrix(part.stored, "sums" if packed else "listed_dots" if listed else "dots", tiles=self.tiles),
            by_inputs=packed, skips=skips, masks=kept is not None and not skips,
            summed=is_summed(packed, skips, part.outputs * part.stored.codes.itemsize, self.threads), sums_at=sums_at,
            threshold=kept and kept.threshold, shared=kept is not None and kept.shared,
        )  # fmt: skip

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
