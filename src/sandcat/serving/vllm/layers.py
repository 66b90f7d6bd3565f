"""What stands inside an engine's layer once its tensors are loaded: one module for parts that are computed alike.

Each holds its weight once, laid out for skipping (`Skipping`, `SkippingUp`), or as the engine packs those of a dense
model (`Masked`), which is faster for many tokens. Masks are the same: the layout changes a token's result by rounding
alone. Shapes: T tokens, I input channels, O outputs; of an MLP, H hidden size, I neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandcat.ops.masks import mask
from sandcat.ops.weights import FORMATS, Stored
from sandcat.serving.vllm import ops


class Outputs(nn.Module):
    """Some outputs of a layer.

    Args:
        weight: without bias, which the engine gives.
        threshold_I: of input channels, if they have any.
    """

    def __init__(self, weight: Stored, threshold_I: Tensor | None):
        super().__init__()
        self.size, self.format = len(weight.codes), weight.format
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.register_buffer("threshold", threshold_I)
        self.register_buffer("scale", weight.scale)

    def stored(self, bias_O: Tensor | None) -> Stored:
        return Stored(self.weight, self.scale, None, bias_O, self.format)


class Skipping(Outputs):
    """Reads the kept input channels of few tokens, whose weights it stores channel by channel."""

    def __init__(self, weight: Stored, threshold_I: Tensor | None):
        if threshold_I is not None:
            weight = weight._replace(codes=weight.codes.t().contiguous().t())
        super().__init__(weight, threshold_I)

    def forward(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if self.threshold is None and self.scale is None:
            return F.linear(x_TI, self.weight, bias_O)
        return ops.linear(x_TI, self.stored(bias_O), self.threshold)


class SkippingUp(Outputs):
    """An up projection that reads the kept neurons of few tokens; its thresholds are theirs."""

    def __init__(self, weight: Stored, threshold_I: Tensor, activation: str):
        super().__init__(weight, threshold_I)
        self.activation = activation

    def forward(self, x_TH: Tensor, g_TI: Tensor, bias_I: Tensor | None = None) -> Tensor:
        return ops.up(x_TH, g_TI, self.stored(bias_I), self.threshold, self.activation)


class Masked(Outputs):
    """Masks its input, and multiplies as the engine does for a dense model.

    Args:
        dtype: of the activations; codes become numbers of it, which hold them exactly.
        pack: has the engine pack the weight of a module; what it returns multiplies by it.
    """

    def __init__(
        self, weight: Stored, threshold_I: Tensor | None, *, dtype: torch.dtype,
        pack: Callable[[nn.Module], Callable[[Tensor], Tensor]],
    ):  # fmt: skip
        if weight.scale is not None:  # times the unit sums stay in the range of float16
            row = FORMATS[weight.format]
            numbers, scale = row.widened(weight.codes, dtype), weight.scale.float() / row.unit
            weight = Stored(numbers, scale)
        super().__init__(weight, threshold_I)
        self.multiply = pack(self)

    def forward(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if self.threshold is not None:
            x_TI = mask(x_TI, self.threshold)
        y_TO = self.multiply(x_TI)
        if self.scale is not None:
            y_TO = (y_TO * self.scale).to(x_TI.dtype)
        return y_TO if bias_O is None else y_TO + bias_O
