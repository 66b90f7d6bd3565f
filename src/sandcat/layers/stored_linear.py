"""A linear layer with int8 weights. Shapes: see ops/int8_linear.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sandcat.layers.op_module import Kernel
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
    def dtype(self) -> torch.dtype:
        return self.weight_scale.dtype

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
