"""A linear layer of a sparsified model that skips input channels. Shapes: see ops/sparse_linear.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sandcat.layers.sparse_module import Batch, Thresholded
from sandcat.layers.step_parts import KeptProduct
from sandcat.layers.stored_linear import StoredLinear
from sandcat.layers.weights import stored_of
from sandcat.ops.shared_units import reference_linear, shared_linear
from sandcat.ops.sparse_linear import reference, sparse_linear
from sandcat.ops.weights import product


class SparseLinear(Thresholded, nn.Linear):
    """Takes over the parameters of a linear layer, under their names, and adds one threshold an input channel.

    It is an `nn.Linear`, so that adapters (PEFT) go around it as around the dense one.

    Args:
        linear: the layer, whose parameters are shared, not copied; on the meta device too.
        dense_prompt, batch: see `Sparse` and `Thresholded`.
    """

    op = "sparse_linear"
    shared_op = "shared_linear"
    _is_hf_initialized = True
    """To transformers: never random, as what is missing here is an error (`registration.check_loaded`)."""

    def __init__(self, linear: nn.Linear | StoredLinear, *, dense_prompt: bool = False, batch: Batch = "own"):
        super().__init__(dense_prompt=dense_prompt, batch=batch)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_scale, self.format = getattr(linear, "weight_scale", None), stored_of(linear).format
        self.set_threshold(linear.in_features, stored_of(linear).like)

    @property
    def dtype(self) -> torch.dtype:
        return stored_of(self).like.dtype

    @property
    def size(self) -> int:
        return self.weight.numel()

    @property
    def skipped(self) -> nn.Parameter:
        return self.weight

    def scores(self, x: Tensor) -> Tensor:
        return x.abs()

    def masked(self, x: Tensor) -> Tensor:
        """x with what is dropped of it set to 0."""
        return self.in_parts(x, lambda whole: whole, lambda rest: torch.where(self.kept(rest), rest, 0))

    def by_kernel(self, x: Tensor) -> Tensor:
        run = shared_linear if self.shares(x) else sparse_linear
        return run(x.flatten(0, -2), stored_of(self), self.threshold)

    def by_definition(self, x: Tensor) -> Tensor:
        run = reference_linear if self.shares(x) else reference
        return run(x, stored_of(self), self.threshold)

    def dense(self, x: Tensor) -> Tensor:
        return product(x, stored_of(self))

    def weight_bytes(self, kept: float = 1.0) -> int:
        return round(kept * self.weight.nbytes) + self.threshold.nbytes + stored_of(self).small_bytes()

    def step_part(self, x: Tensor) -> KeptProduct:
        return KeptProduct(self, stored_of(self), self.kept_in_step(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
