"""A linear layer of a sparsified model that skips input channels. Shapes: see ops/sparse_linear.py."""

from __future__ import annotations

from torch import Tensor, nn

from sandcat.layers.int8 import Int8Linear, dtype_like, scale_of
from sandcat.layers.sparse import Thresholded
from sandcat.ops.sparse_linear import reference, sparse_linear


class SparseLinear(Thresholded):
    """Takes over the parameters of a linear layer, under their names, and adds one threshold an input channel.

    Args:
        linear: the layer, whose parameters are shared, not copied; on the meta device too.
        dense_prompt: see `Sparse`.
    """

    op = "sparse_linear"

    def __init__(self, linear: nn.Linear | Int8Linear, *, dense_prompt: bool = False):
        super().__init__(dense_prompt=dense_prompt)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_scale = getattr(linear, "weight_scale", None)
        self.set_threshold(linear.in_features, dtype_like(linear))

    @property
    def int8(self) -> bool:
        return self.weight_scale is not None

    def pack(self) -> None:
        """Stores the weight channel-major, once; its shape [O, I] and its values stay, as a transposed view."""
        self.weight.data = self.weight.data.t().contiguous().t()

    def scores(self, x_TH: Tensor) -> Tensor:
        return x_TH.abs()

    def by_kernel(self, x_TH: Tensor, threshold_U: Tensor) -> Tensor:
        return sparse_linear(x_TH, self.weight.t(), threshold_U, self.bias, scale_of(self))

    def by_definition(self, x_TH: Tensor, threshold_U: Tensor) -> Tensor:
        return reference(x_TH, self.weight.t(), threshold_U, self.bias, scale_of(self))

    def weight_bytes(self, kept: float = 1.0) -> int:
        small = sum(t.nbytes for t in (self.threshold, self.bias, self.weight_scale) if t is not None)
        return round(kept * self.weight.nbytes) + small

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
