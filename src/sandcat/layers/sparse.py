"""What modules that skip weights have in common: all that evaluation, benchmarks and reports know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from sandcat.ops import PROMPT_CHUNK, most_tokens


class Sparse(nn.Module, ABC):
    """Reads, for each token, only the weights of the units (neurons, input channels) whose score is above a threshold.

    Subclasses call `set_threshold` once they have their weights. Shapes: T tokens, H numbers a token, U units.

    Args:
        dense_prompt: a forward with more than one token a sequence (a prompt) drops nothing.
    """

    op: ClassVar[str]
    """The op that runs it."""

    def __init__(self, *, dense_prompt: bool):
        super().__init__()
        self.dense_prompt = dense_prompt
        self.by_reference = False

    def set_threshold(self, units: int, like: Tensor) -> None:
        self.register_buffer("threshold", torch.zeros(units, dtype=like.dtype, device=like.device))

    @abstractmethod
    def scores(self, x_TH: Tensor) -> Tensor:
        """What the thresholds are compared with, at least 0, [T, U]."""

    @abstractmethod
    def by_kernel(self, x_TH: Tensor, threshold_U: Tensor) -> Tensor:
        """The op on a few tokens."""

    @abstractmethod
    def by_definition(self, x_TH: Tensor, threshold_U: Tensor) -> Tensor:
        """The same by dense products, for any number of tokens."""

    @abstractmethod
    def weight_bytes(self, kept: float = 1.0) -> int:
        """Bytes of weights and thresholds that are read if a share `kept` of the units is."""

    @abstractmethod
    def pack(self) -> None:
        """Lays the weights out for the kernels; shapes and values stay."""

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold
        if self.dense_prompt and x.shape[-2] > 1:
            threshold = torch.full_like(threshold, -1)
        x_TH = x.reshape(-1, x.shape[-1])
        if x_TH.shape[0] <= most_tokens(self.op, x.device, x.dtype) and not self.by_reference:
            y_TH = self.by_kernel(x_TH, threshold).to(x.dtype)
        else:
            y_TH = torch.cat([self.by_definition(part, threshold).to(x.dtype) for part in x_TH.split(PROMPT_CHUNK)])
        return y_TH.view(*x.shape[:-1], y_TH.shape[-1])

    def kept(self, x_TH: Tensor) -> Tensor:
        """Which units each token keeps, bool [T, U]. A NaN is kept: it comes out, as it would of the dense module."""
        return ~(self.scores(x_TH) <= self.threshold)

    def bytes_read(self, x_TH: Tensor) -> int:
        """Bytes that the kernels read for these tokens: what any of them keeps."""
        return self.weight_bytes(float(self.kept(x_TH).any(0).float().mean()))

    def extra_repr(self) -> str:
        return f"dense_prompt={self.dense_prompt}"


@contextmanager
def references(model: nn.Module) -> Iterator[None]:
    """Within this context the sparse modules run their definition instead of the kernels."""
    for module in sparse_modules(model).values():
        module.by_reference = True
    try:
        yield
    finally:
        for module in sparse_modules(model).values():
            module.by_reference = False


def sparse_modules(model: nn.Module) -> dict[str, Sparse]:
    """The modules of a model that skip, by their names, in order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse)}
