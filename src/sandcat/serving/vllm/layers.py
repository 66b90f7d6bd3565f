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
from sandcat.serving.vllm import ops

CODE_SCALE = 2**7
"""Codes as floats are divided by it, which keeps sums in the range of float16, and scales multiplied."""


class Outputs(nn.Module):
    """Some outputs of a layer.

    Args:
        weight_OI: floats, or int8 codes if there are scales.
        threshold_I: of input channels, if they have any.
        scale_O: of int8 weights.
    """

    def __init__(self, weight_OI: Tensor, threshold_I: Tensor | None, scale_O: Tensor | None):
        super().__init__()
        self.size = len(weight_OI)
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.register_buffer("threshold", threshold_I)
        self.register_buffer("scale", scale_O)


class Skipping(Outputs):
    """Reads the kept input channels of few tokens, whose weights it stores channel by channel."""

    def __init__(self, weight_OI: Tensor, threshold_I: Tensor | None, scale_O: Tensor | None):
        if threshold_I is not None:
            weight_OI = weight_OI.t().contiguous().t()
        super().__init__(weight_OI, threshold_I, scale_O)

    def forward(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if self.threshold is None and self.scale is None:
            return F.linear(x_TI, self.weight, bias_O)
        return ops.linear(x_TI, self.weight, self.threshold, bias_O, self.scale)


class SkippingUp(Outputs):
    """An up projection that reads the kept neurons of few tokens; its thresholds are theirs."""

    def __init__(self, weight_IH: Tensor, threshold_I: Tensor, scale_I: Tensor | None, activation: str):
        super().__init__(weight_IH, threshold_I, scale_I)
        self.activation = activation

    def forward(self, x_TH: Tensor, g_TI: Tensor, bias_I: Tensor | None = None) -> Tensor:
        return ops.up(x_TH, g_TI, self.weight, self.threshold, bias_I, self.scale, self.activation)


class Masked(Outputs):
    """Masks its input, and multiplies as the engine does for a dense model.

    Args:
        dtype: of the activations; int8 codes become numbers of it, which hold them exactly.
        pack: has the engine pack the weight of a module; what it returns multiplies by it.
    """

    def __init__(
        self, weight_OI: Tensor, threshold_I: Tensor | None, scale_O: Tensor | None, *, dtype: torch.dtype,
        pack: Callable[[nn.Module], Callable[[Tensor], Tensor]],
    ):  # fmt: skip
        if scale_O is not None:
            weight_OI, scale_O = weight_OI.to(dtype) / CODE_SCALE, scale_O.float() * CODE_SCALE
        super().__init__(weight_OI, threshold_I, scale_O)
        self.multiply = pack(self)

    def forward(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if self.threshold is not None:
            x_TI = mask(x_TI, self.threshold)
        y_TO = self.multiply(x_TI)
        if self.scale is not None:
            y_TO = (y_TO * self.scale).to(x_TI.dtype)
        return y_TO if bias_O is None else y_TO + bias_O
