"""What modules that skip weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sandcat.layers.op_module import Kernel, tokens_of
from sandcat.ops.shared_units import shared_units

Batch = Literal["own", "shared"]
"""What the sequences of a decode step read, where there are several: what each keeps, or one list for all."""


class Sparse(Kernel):
    """Reads, for each token, only the weights of some units (neurons, input channels).

    A decode step of more sequences than skipping pays for runs dense. Shapes: x [..., H], H numbers a token; B
    sequences, T tokens, U units.

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
        self.packed = False

    @abstractmethod
    def kept(self, x: Tensor) -> Tensor:
        """Which units each token uses if it skips, bool [..., U]."""

    @abstractmethod
    def dense(self, x: Tensor) -> Tensor:
        """With all units, as the dense module has it."""

    @property
    @abstractmethod
    def skipped(self) -> nn.Parameter:
        """The weight [O, I] whose inputs are skipped, which its kernel reads by inputs."""

    def pack(self) -> None:
        """Stores that weight by inputs, for the kernels; its shape and its values stay, as a transposed view."""
        self.skipped.data = self.skipped.data.t().contiguous().t()
        self.packed = True

    def unpack(self) -> None:
        """Stores it by outputs, as a dense layer does, for steps in which nothing is skipped; `pack` takes it back."""
        self.skipped.data = self.skipped.data.contiguous()
        self.packed = False

    def dense_step(self, x: Tensor) -> Tensor:
        """`dense`, for a step that `runs_dense`: on a CPU products of a few tokens take up to twice as long where the
        weight is stored by inputs."""
        if self.packed and x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.unpack()
        return self.dense(x)

    def runs_dense(self, x: Tensor) -> bool:
        """Whether this is a decode step of more sequences than skipping pays for."""
        return is_batch(x) and tokens_of(x) > self.most_tokens(x)

    def step_kernel(self, x: Tensor) -> str:
        return "dense" if self.runs_dense(x) else super().step_kernel(x)

    def largest_batch(self, x: Tensor) -> int:
        return max(1, self.most_tokens(x))

    def bytes_read(self, x: Tensor) -> int:
        if self.runs_dense(x):
            return self.weight_bytes()
        return self.weight_bytes(float(self.kept(x).flatten(0, -2).any(0).float().mean()))

    def extra_repr(self) -> str:
        return f"dense_prompt={self.dense_prompt}"


class Thresholded(Sparse):
    """Keeps the units whose score is above a threshold. Subclasses call `set_threshold` when they have weights.

    Args:
        batch: with "shared", the sequences of a decode step use one list of units (see ops/shared_units.py).
    """

    shared_op: ClassVar[str]
    """The op that runs a step of several sequences then."""

    def __init__(self, *, dense_prompt: bool, batch: Batch = "own"):
        super().__init__(dense_prompt=dense_prompt)
        self.batch = batch
        self.lockstep = False
        """Every position of the sequences of a forward is a decode step of them."""

    def set_threshold(self, units: int, like: Tensor) -> None:
        self.register_buffer("threshold", torch.zeros(units, dtype=like.dtype, device=like.device))

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """What the thresholds are compared with, at least 0, [..., U]."""

    def run(self, x: Tensor) -> Tensor:
        if self.lockstep and self.shares(x):
            return self.by_definition(x).to(x.dtype)
        if self.runs_dense(x):
            return self.dense_step(x)
        if self.dense_prompt and x.shape[-2] > 1:
            return self.dense(x)
        return super().run(x)

    def shares(self, x: Tensor) -> bool:
        """Whether the sequences of this forward use one list."""
        return self.batch == "shared" and (self.lockstep or is_batch(x))

    def op_for(self, x: Tensor) -> str:
        return self.shared_op if self.shares(x) else self.op

    def kept(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        if self.shares(x):
            return shared_units(scores, self.threshold).expand_as(scores)
        # A NaN is kept: it comes out, as it would of the dense module.
        return ~(scores <= self.threshold)

    def extra_repr(self) -> str:
        return f"batch={self.batch}, {super().extra_repr()}"


def is_batch(x: Tensor) -> bool:
    """Whether x [..., H] are tokens of several sequences, one each, as a decode step has them."""
    return x.shape[-2] == 1 and tokens_of(x) > 1


def sparse_modules(model: nn.Module) -> dict[str, Sparse]:
    """The modules of a model that skip, by their names, in order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Sparse)}
