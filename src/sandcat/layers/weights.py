"""A linear layer's matrix, as it lies."""

from __future__ import annotations

from torch import nn

from sandcat.ops.weights import Stored


def stored_of(linear: nn.Module) -> Stored:
    """The matrix of a linear layer, `nn.Linear` or one of ours."""
    scale_O1 = getattr(linear, "weight_scale", None)
    scale_O = None if scale_O1 is None else scale_O1[:, 0]
    return Stored(linear.weight, scale_O, None, linear.bias, getattr(linear, "format", "float"))
