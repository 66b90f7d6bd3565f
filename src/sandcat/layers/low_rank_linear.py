"""A linear layer that skips input channels and approximates what they add. Shapes: see ops/sparse_linear.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.step_parts import LowRankProduct
from sandcat.layers.stored_linear import StoredLinear
from sandcat.layers.weights import stored_of


class LowRankLinear(SparseLinear):
    """A `SparseLinear` that adds B (A x_dropped), of two factors that are read whole for every token.

    Args:
        rank: rows of A [R, I] and columns of B [O, R], at least 1.
        linear, dense_prompt: see `SparseLinear`.
    """

    def __init__(self, linear: nn.Linear | StoredLinear, *, rank: int, dense_prompt: bool = False):
        super().__init__(linear, dense_prompt=dense_prompt)
        like = stored_of(linear).like.detach()
        self.register_buffer("factor_a", like.new_zeros(rank, linear.in_features))
        self.register_buffer("factor_b", like.new_zeros(linear.out_features, rank))

    def by_kernel(self, x: Tensor) -> Tensor:
        return self._with_dropped(super().by_kernel(x), x.flatten(0, -2))

    def by_definition(self, x: Tensor) -> Tensor:
        return self._with_dropped(super().by_definition(x), x)

    def _with_dropped(self, kept: Tensor, x: Tensor) -> Tensor:
        dropped = torch.where(x.abs() <= self.threshold, x, 0)
        # Rounded before the sum, as products in the model's dtype are, so that kernel and definition do not differ.
        return kept.to(x.dtype) + F.linear(F.linear(dropped, self.factor_a), self.factor_b)

    def weight_bytes(self, kept: float = 1.0) -> int:
        return super().weight_bytes(kept) + self.factor_a.nbytes + self.factor_b.nbytes

    def step_part(self, x: Tensor) -> LowRankProduct:
        return LowRankProduct(self, stored_of(self), self.kept_in_step(x), self.factor_a, self.factor_b)

    def extra_repr(self) -> str:
        return f"rank={len(self.factor_a)}, {super().extra_repr()}"
