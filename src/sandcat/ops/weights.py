"""A matrix as it lies: `Stored`; the ways in which it may lie: `FORMATS`; and a dense product with it.

Shapes: T tokens, I input channels, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**24
"""Codes that are widened at once for a dense product: a weight never lies in memory as a whole twice."""


class Stored(NamedTuple):
    """The matrix of a linear layer as it is stored, and the layer's bias. All its tensors have the outputs first; the
    codes may lie by inputs, as a transposed view.

    Output o is `scale[o] * (codes[o] . x) + bias[o]`: a scale belongs to an output, so it is applied once, at the end,
    whatever inputs were skipped.
    """

    codes: Tensor
    """[O, I], in the dtype of its format."""
    scale: Tensor | None = None
    """[O], in the dtype of the activations; None where codes are numbers of that dtype."""
    zero: Tensor | None = None
    """What codes are to be counted from; no format has it yet."""
    bias: Tensor | None = None
    """[O]."""
    format: str = "float"
    """A name of `FORMATS`."""

    @property
    def like(self) -> Tensor:
        """A tensor in the dtype of the activations."""
        return self.codes if self.scale is None else self.scale

    def check(self, what: str) -> None:
        """
        Args:
            what: is said of it in the error.

        Raises:
            ValueError: codes without scales, or numbers of the activations' dtype with them.
        """
        numbers = FORMATS[self.format].codes is None
        if (self.scale is None) != numbers:
            raise ValueError(
                f"{what} is stored as {self.format}, so it must have {'no ' * numbers}scales: codes have, numbers of "
                "the activations' dtype have not."
            )

    def rows(self, part: slice) -> Stored:
        """Some of the outputs, as a view."""
        scale, zero, bias = (None if t is None else t[part] for t in (self.scale, self.zero, self.bias))
        return Stored(self.codes[part], scale, zero, bias, self.format)

    def small_bytes(self) -> int:
        """Bytes of what is read whatever is skipped: all but the codes."""
        return sum(t.nbytes for t in (self.scale, self.zero, self.bias) if t is not None)

    def float(self) -> Tensor:
        """The matrix in float32, [O, I]."""
        if self.scale is None:
            return self.codes.float()
        return self.codes.float() * self.scale.float()[:, None]


@dataclass(frozen=True)
class Format:
    """What is to be known of a way to store matrices. Kernels know it by its code."""

    code: int
    codes: torch.dtype | None
    """Of the codes; None: of the activations, and then there are no scales."""
    largest: float = 1.0
    """Of the codes, which reach as far below 0."""
    unit: float = 1.0
    """A power of two: codes times it are at most 1, and exact in every dtype of activations."""
    layout: str | None = None
    """What compressed-tensors calls weights that are stored so."""
    compressed: dict[str, Any] = field(default_factory=dict)
    """How its config describes them."""
    whole: tuple[str, ...] = ("weight_scale",)
    """Tensors of a layer that stay whole where several devices have parts of its inputs: those that belong to
    outputs."""
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    """Kinds of devices whose kernels can read it; elsewhere the references run."""

    def widened(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers that codes stand for, times the unit. This defines the format."""
        return codes.to(dtype).mul_(self.unit)

    def nearest(self, numbers: Tensor) -> Tensor:
        """The codes next to numbers, ties to even; the largest for what is beyond it."""
        assert self.codes is not None
        whole = numbers if self.codes.is_floating_point else numbers.round()
        return whole.clamp(-self.largest, self.largest).to(self.codes)


def _eight_bits(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}


FORMATS = {
    "float": Format(0, None),
    "int8": Format(1, torch.int8, 127, 2**-7, "int-quantized", _eight_bits("int")),
    "fp8": Format(2, torch.float8_e4m3fn, 448, 2**-9, "float-quantized", _eight_bits("float")),
}
"""By name: numbers of the activations' dtype; whole numbers; and floats of four bits of exponent and three of mantissa
(e4m3, up to 448). The last two have one scale an output.

A new format is a row here, its readers in ops/numba/primitives/dtypes.py and ops/triton/primitives/blocks.py, and a
method that stores weights so."""
CODED = tuple(name for name, row in FORMATS.items() if row.codes is not None)
"""Those that have codes, and scales."""


def product(x_TI: Tensor, weight: Stored) -> Tensor:
    """x times a matrix, plus the bias; in x's dtype, [..., T, O]. Codes are widened in parts, and exact."""
    codes_OI, scale_O, _, bias_O, name = weight
    if scale_O is None:
        return F.linear(x_TI, codes_OI, bias_O)
    parts, rows, row = [], max(1, AT_ONCE // x_TI.shape[-1]), FORMATS[name]
    for first in range(0, len(codes_OI), rows):
        part = slice(first, first + rows)
        y_TO = F.linear(x_TI, row.widened(codes_OI[part], x_TI.dtype)).float() * (scale_O[part].float() / row.unit)
        parts.append((y_TO if bias_O is None else y_TO + bias_O[part]).to(x_TI.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
