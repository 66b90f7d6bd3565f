"""A linear layer whose weight is stored as codes. Shapes: see ops/stored_linear.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sandcat.layers.op_module import Kernel
from sandcat.layers.step_parts import Product
from sandcat.layers.weights import stored_of
from sandcat.ops.stored_linear import reference, stored_linear
from sandcat.ops.weights import FORMATS


class StoredLinear(Kernel):
    """`weight` [O, I], the codes, and `weight_scale` [O, 1] in the model's dtype, in place of the weight of an
    `nn.Linear`: names and shapes of compressed-tensors.

    Args:
        linear: the dense layer, whose bias is shared; on the meta device too.
        format: a name of `FORMATS` that has codes.
    """

    op = "stored_linear"

    def __init__(self, linear: nn.Linear, format: str):
        super().__init__()
        like = linear.weight
        self.format = format
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros_like(like, dtype=FORMATS[format].codes), requires_grad=False)
        self.weight_scale = nn.Parameter(like.new_ones(len(like), 1), requires_grad=False)
        self.bias = linear.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_scale.dtype

    @property
    def size(self) -> int:
        return self.weight.numel()

    def by_kernel(self, x: Tensor) -> Tensor:
        return stored_linear(x.flatten(0, -2), stored_of(self))

    def by_definition(self, x: Tensor) -> Tensor:
        return reference(x, stored_of(self))

    def weight_bytes(self, kept: float = 1.0) -> int:
        return sum(p.nbytes for p in self.parameters())

    def step_part(self, x: Tensor) -> Product:
        return Product(self, stored_of(self))

    def extra_repr(self) -> str:
        return f"format={self.format}, in_features={self.in_features}, out_features={self.out_features}"
