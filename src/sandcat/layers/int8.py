"""A linear layer with int8 weights. Shapes: see ops/int8_linear.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sandcat.layers.kernel import Kernel
from sandcat.ops.int8_linear import int8_linear, reference


class Int8Linear(Kernel):
    """`weight` int8 [O, I] and `weight_scale` [O, 1] in the model's dtype, in place of the weight of an `nn.Linear`.

    Args:
        linear: the dense layer, whose bias is shared; on the meta device too.
    """

    op = "int8_linear"
    int8 = True

    def __init__(self, linear: nn.Linear):
        super().__init__()
        like = linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros_like(like, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(like.new_ones(len(like), 1), requires_grad=False)
        self.bias = linear.bias

    @property
    def size(self) -> int:
        return self.weight.numel()

    def by_kernel(self, x: Tensor) -> Tensor:
        return int8_linear(x.flatten(0, -2), self.weight, self.weight_scale[:, 0], self.bias)

    def by_definition(self, x: Tensor) -> Tensor:
        return reference(x, self.weight, self.weight_scale[:, 0], self.bias)

    def weight_bytes(self, kept: float = 1.0) -> int:
        return sum(p.nbytes for p in self.parameters())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


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
