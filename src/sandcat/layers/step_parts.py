"""What a layer is made of, as a fused step sees it: parts, handed out by modules.

A step merges neighbours and maps the exact types of parts to what runs them; a part that it does not know, it calls as
a module. So a module takes part in every step, and in faster ones by a method `step_part`, where they have a launcher
for what that gives. A subclass does not inherit it: it may compute something else, and is called.

Shapes: B sequences, H hidden size, I inputs, O outputs, R rank, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor, nn

from sandcat.layers.cache import CacheLayer
from sandcat.layers.prompts import is_in_steps
from sandcat.layers.weights import stored_of
from sandcat.ops.weights import Stored


@dataclass(frozen=True, eq=False)
class Part:
    """Something that gives y for x, both [B, 1, ...]: what its module computes for tokens that are decoded."""

    module: nn.Module


class Called(Part):
    """What nobody has described."""


@dataclass(frozen=True, eq=False)
class Linear(Part):
    """What products have in common: y = W x + b, with W as it is stored."""

    stored: Stored

    @property
    def outputs(self) -> int:
        return self.stored.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.stored.codes.shape[1]

    @property
    def lies(self) -> bool:
        """Whether the weight is one piece of memory, [O, I]."""
        return self.stored.codes.is_contiguous()


class Product(Linear):
    """y = W x + b of all inputs."""


class Kept(NamedTuple):
    """What is kept of some units: those whose score is above a threshold. The others count as 0.

    Args:
        threshold: one a unit, [U].
        shared: the sequences use one list of them.
        skips: what is dropped is not read.
        packed: the weight whose inputs they are lies by inputs.
    """

    threshold: Tensor
    shared: bool
    skips: bool
    packed: bool


@dataclass(frozen=True, eq=False)
class KeptProduct(Linear):
    """y = W x_kept + b."""

    kept: Kept

    @property
    def lies(self) -> bool:
        """Whether the weight is one piece of memory, [I, O] if it is packed."""
        codes = self.stored.codes
        return (codes.t() if self.kept.packed else codes).is_contiguous()


@dataclass(frozen=True, eq=False)
class LowRankProduct(KeptProduct):
    """y = W x_kept + b + B (A x_dropped), with A [R, I] and B [O, R]."""

    factor_a: Tensor
    factor_b: Tensor

    @property
    def without(self) -> KeptProduct:
        """The same without what is dropped."""
        return KeptProduct(self.module, self.stored, self.kept)


@dataclass(frozen=True, eq=False)
class GatedNeurons(Part):
    """y = down(activation(gate(x)) * up(x)), of three parts.

    Args:
        activation: as `ops.activations` names it.
    """

    gate: Any
    up: Any
    down: Any
    activation: str


@dataclass(frozen=True, eq=False)
class KeptNeurons(GatedNeurons):
    """The same of the neurons that are kept, by what the activation gives."""

    kept: Kept


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention to what a layer has cached, to which the rows that the parts q, k and v give are added. Every step has
    a launcher for it.

    Args:
        q_norm, k_norm: of each head, before it is rotated.
        scaling: of scores.
    """

    q: Any
    k: Any
    v: Any
    o: Any
    q_norm: Norm | None
    k_norm: Norm | None
    scaling: float
    cached: CacheLayer


class Branch(NamedTuple):
    """state += part(norm(state)); a layer is a list of these."""

    norm: Norm
    part: Any


def part_of(module: nn.Module, x_B1H: Tensor) -> Part:
    """The part of a module, for a step of sequences like x, in the dtype of the model."""
    if is_changed(module):
        return Called(module)
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:  # else what others have quantised
        part: Part = Product(module, stored_of(module))
    elif "step_part" in vars(type(module)):
        part = module.step_part(x_B1H)
    else:
        return Called(module)
    return part if all(tensor.dtype == x_B1H.dtype for tensor in _numbers(part)) else Called(module)


def is_changed(module: nn.Module) -> bool:
    """Whether a module does more than its class says: by hooks that steps do not know, or by a forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(map(is_in_steps, hooks))


def _numbers(part: Part) -> Iterator[Tensor]:
    """The tensors of a part that kernels read in the model's dtype; those of parts in it have been looked at."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Stored):
            yield from (tensor for tensor in (value.like, value.bias) if tensor is not None)
        elif isinstance(value, Kept):
            yield value.threshold
        elif isinstance(value, Tensor):
            yield value
