"""Arguments that CUDA kernels take together. What is not there is None in them, as Triton 3.6 cannot ask a tuple that
has a None whether it is one itself. What one launch has of each of up to three matrices are plain tuples of three,
filled up with the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """What products are with: x, act(gate) * x, or x after an RMSNorm."""

    x: Tensor | None
    gate: Tensor | None = None
    norm: Tensor | None = None
    """The weight of the norm."""
    eps: float = 0.0


class Zeros(NamedTuple):
    """What a kernel fills with zeros besides: float32."""

    at: Tensor | None = None
    n: int = 0


class Neurons(NamedTuple):
    """The list that kept neurons of a gate go into, with what it gave; see `keep_neurons`."""

    threshold: Tensor | None = None
    listed: Tensor | None = None
    a: Tensor | None = None
    counter: Tensor | None = None


class Heads(NamedTuple):
    """What the input is added up of, where x is the parts that `attend` leaves of heads: their maxima and sums, and the
    size of a head."""

    top: Tensor | None = None
    sum: Tensor | None = None
    size: int = 0


class Lists(NamedTuple):
    """Room for what programs write: channels that they keep, and what they multiply those with; where sums have a fixed
    order, their sums, and how many programs of a tile have left theirs."""

    channel: Tensor
    factor: Tensor
    parts: Tensor | None = None
    arrived: Tensor | None = None


def three(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Tensors of up to three matrices, filled up to three."""
    tensors = tuple(tensors)
    return tensors + tensors[:1] * (3 - len(tensors))


def three_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Output sizes of up to three matrices, filled up to three: of the others there is nothing."""
    sizes = tuple(sizes)
    return sizes + (0,) * (3 - len(sizes))
