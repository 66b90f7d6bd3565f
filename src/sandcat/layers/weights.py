"""A linear layer's weight, as it is stored: its scales, its dtype, its value."""

from __future__ import annotations

from torch import Tensor, nn


def scale_of(linear: nn.Module) -> Tensor | None:
    """The scales [O] of a linear layer's weight, if it is int8."""
    scale_O1 = getattr(linear, "weight_scale", None)
    return None if scale_O1 is None else scale_O1[:, 0]


def dtype_like(linear: nn.Module) -> Tensor:
    """A tensor in the dtype that a linear layer computes in: its weight, or the scales of that."""
    scale_O = scale_of(linear)
    return linear.weight if scale_O is None else scale_O


def float_weight(linear: nn.Module) -> Tensor:
    """A linear layer's weight in float32, [O, I]."""
    scale_O = scale_of(linear)
    return linear.weight.float() if scale_O is None else linear.weight * scale_O.float()[:, None]
