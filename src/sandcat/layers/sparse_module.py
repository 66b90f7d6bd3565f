"""What modules that skip weights have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sandcat.layers.op_module import Kernel, tokens_of
from sandcat.layers.prompts import Prompts
from sandcat.layers.reading import Reading
from sandcat.layers.step_parts import Kept
from sandcat.ops.pays import skips_rows
from sandcat.ops.shared_units import shared_units

Batch = Literal["own", "shared"]
"""What the sequences of a decode step read, where there are several: what each keeps, or one list for all."""


class Sparse(Kernel):
    """Reads, for each token, only the weights of some units (neurons, input channels).

    Which those are does not depend on how many tokens there are: where skipping does not pay, what is dropped is read
    and counts as 0. Shapes: x [..., H], H numbers a token; B sequences, T tokens, U units.

    Args:
        dense_prompt: tokens that belong to a prompt use all units.
    """

    chooses_in_prompt: ClassVar[bool] = False
    """Whether it chooses its units in a prompt, for all tokens after it."""

    def __init__(self, *, dense_prompt: bool):
        super().__init__()
        self.dense_prompt, self.laid_out = dense_prompt, False
        self.prompts: Prompts | None = None
        """What follows the forwards of the model that it is part of, where a module of that has to know them."""

    @abstractmethod
    def kept(self, x: Tensor) -> Tensor:
        """Which units each token uses if it skips, bool [..., U]."""

    @abstractmethod
    def dense(self, x: Tensor) -> Tensor:
        """With all units, as the dense module has it."""

    @property
    @abstractmethod
    def skipped(self) -> nn.Parameter:
        """The weight [O, I] whose inputs are skipped."""

    @property
    def packed(self) -> bool:
        """Whether that weight is stored by inputs, as its kernel reads it."""
        return self.skipped.t().is_contiguous()

    def pack(self) -> None:
        """Stores it so, once, before anything runs; as a dense layer does where rows are too short to skip. Its shape
        and its values stay: by inputs it is a transposed view."""
        weight = self.skipped.data
        by_inputs = skips_rows(weight.device, weight.shape[0] * weight.itemsize)
        self.skipped.data = weight.t().contiguous().t() if by_inputs else weight.contiguous()
        self.laid_out = True

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.laid_out:  # on another device, or in another dtype, it may lie otherwise
            self.pack()
        return self

    def reading(self) -> Reading | None:
        """The forward that runs; None outside of one, and if nobody follows it."""
        return None if self.prompts is None else self.prompts.now.get()

    def whole_tokens(self, x: Tensor) -> int:
        """How many first tokens of each sequence use all units, as they belong to a prompt."""
        if not self.dense_prompt or self.prompts is None:  # while it is calibrated, for what is decoded
            return 0
        reading = self.reading()
        if reading is None:
            return x.shape[-2]
        return 0 if reading.sparse else reading.first

    def in_parts(self, x: Tensor, whole: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        """What `whole` makes of the tokens of a prompt that uses all units, and `rest` of the others."""
        first = self.whole_tokens(x)
        if first == 0:
            return rest(x)
        if first == x.shape[-2]:
            return whole(x)
        return torch.cat([whole(x[..., :first, :]), rest(x[..., first:, :])], -2)

    def pays(self, x: Tensor) -> bool:
        return self.packed and super().pays(x)

    def reads_all(self, x: Tensor) -> bool:
        """Whether these are the tokens of more sequences than skipping pays for."""
        return tokens_of(x) > self.largest_batch(x)

    def step_kernel(self, x: Tensor) -> str:
        return "masked" if self.reads_all(x) else super().step_kernel(x)

    def largest_batch(self, x: Tensor) -> int:
        return max(1, self.most_tokens(x))

    def bytes_read(self, x: Tensor) -> int:
        if self.reads_all(x):
            return self.weight_bytes()
        return self.weight_bytes(float(self.kept(x).flatten(0, -2).any(0).float().mean()))

    def extra_repr(self) -> str:
        return f"dense_prompt={self.dense_prompt}"


class Thresholded(Sparse):
    """Keeps the units whose score is above a threshold. Subclasses call `set_threshold` when they have weights.

    Args:
        batch: with "shared", the sequences of a decode step use one list of units (see ops/shared_units.py): the one
            case in which a token's units depend on those beside it.
    """

    shared_op: ClassVar[str]
    """The op that runs a step of several sequences then."""

    def __init__(self, *, dense_prompt: bool, batch: Batch = "own"):
        super().__init__(dense_prompt=dense_prompt)
        self.batch = batch

    def set_threshold(self, units: int, like: Tensor) -> None:
        self.register_buffer("threshold", torch.zeros(units, dtype=like.dtype, device=like.device))

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """What the thresholds are compared with, at least 0, [..., U]."""

    def run(self, x: Tensor) -> Tensor:
        return self.in_parts(x, self.dense, self.skipping)

    def skipping(self, x: Tensor) -> Tensor:
        """Of tokens that skip."""
        if self.shares(x) and not is_batch(x):
            return self.by_definition(x).to(x.dtype)
        return super().run(x)

    def shares(self, x: Tensor) -> bool:
        """Whether the sequences of this forward use one list."""
        if self.batch == "own":
            return False
        reading = self.reading()
        if reading is None or reading.together is None:
            return is_batch(x) and (reading is None or reading.first == 0)
        return reading.together

    def kept_in_step(self, x: Tensor) -> Kept:
        """What a step of these sequences keeps."""
        return Kept(self.threshold, self.shares(x), skips=self.packed and not self.reads_all(x), packed=self.packed)

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


def prompts_of(model: nn.Module) -> Prompts | None:
    """What follows the forwards of a model; None if no module of it has to know them."""
    return next((module.prompts for module in sparse_modules(model).values() if module.prompts is not None), None)


def follow_prompts(decoder: nn.Module) -> Prompts | None:
    """Ties the modules inside a decoder that have to know which tokens belong to a prompt to its forwards."""
    modules = list(sparse_modules(decoder).values())
    chooses = any(module.chooses_in_prompt for module in modules)
    matters = any(module.dense_prompt and not module.chooses_in_prompt for module in modules)
    shares = [module for module in modules if isinstance(module, Thresholded) and module.batch == "shared"]
    if not (chooses or matters or shares):
        return None
    prompts = Prompts(chooses=chooses, matters=matters)
    decoder.register_forward_pre_hook(prompts.enter, with_kwargs=True)
    decoder.register_forward_hook(prompts.leave, always_call=True)
    for module in modules:
        module.prompts = prompts
    return prompts
