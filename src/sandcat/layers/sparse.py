"""What modules that skip weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from sandcat.layers.kernel import Kernel


class Sparse(Kernel):
    """Reads, for each token, only the weights of some units (neurons, input channels).

    Shapes: T tokens, H numbers a token, U units.

    Args:
        dense_prompt: a forward with more than one token a sequence (a prompt) drops nothing.
    """

    chooses_in_prompt: ClassVar[bool] = False
    """Whether it chooses its units in a prompt, for all tokens after it."""
    prompt_tokens: int
    """Where it does, the first so many tokens of a forward without a cache are the prompt if `dense_prompt` is off."""

    def __init__(self, *, dense_prompt: bool):
        super().__init__()
        self.dense_prompt = dense_prompt

    @abstractmethod
    def kept(self, x_TH: Tensor) -> Tensor:
        """Which units each token keeps, bool [T, U]."""

    @abstractmethod
    def pack(self) -> None:
        """Lays the weights out for the kernels; shapes and values stay."""

    def bytes_read(self, x_TH: Tensor) -> int:
        """Bytes that the kernels read for these tokens: what any of them keeps."""
        return self.weight_bytes(float(self.kept(x_TH).any(0).float().mean()))

    def extra_repr(self) -> str:
        return f"dense_prompt={self.dense_prompt}"


class Thresholded(Sparse):
    """Keeps the units whose score is above a threshold. Subclasses call `set_threshold` when they have weights."""

    def set_threshold(self, units: int, like: Tensor) -> None:
        self.register_buffer("threshold", torch.zeros(units, dtype=like.dtype, device=like.device))

    @abstractmethod
    def scores(self, x_TH: Tensor) -> Tensor:
        """What the thresholds are compared with, at least 0, [T, U]."""

    def settings(self, x: Tensor) -> tuple[Tensor]:
        if self.dense_prompt and x.shape[-2] > 1:
            return (torch.full_like(self.threshold, -1),)
        return (self.threshold,)

    def kept(self, x_TH: Tensor) -> Tensor:
        # A NaN is kept: it comes out, as it would of the dense module.
        return ~(self.scores(x_TH) <= self.threshold)


def sparse_modules(model: nn.Module) -> dict[str, Sparse]:
    """The modules of a model that skip, by their names, in order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse)}
