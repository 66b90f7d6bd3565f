"""Thresholds from exact quantiles of very many numbers, without sorting them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from sandcat.errors import DataError
from sandcat.support.processes import everyones

LARGEST = 65280.0
"""The largest number that float16 and bfloat16 both have. Thresholds end there, in every dtype, so that a model keeps
them when it is loaded in another one; a unit that adds nothing is dropped up to there."""


def quantile(a_TI: Sequence[Tensor], weight_I: Tensor, q: float) -> float:
    """The smallest score t for which a share q of all scores is <= t (or the score below it, if that is nearer q).

    A score is a * weight in float32, both >= 0. Floats that are not negative sort like their bits, so two counts over
    65,536 bins, of the high and then of the low half of the bits, find the value exactly: no sort, and no memory
    beyond one batch of scores. Counts of several processes are added, which is exact too.

    Args:
        a_TI: batches of [T, I], >= 0.
        weight_I: [I], >= 0.
        q: in (0, 1).
    """

    def bits(a: Tensor) -> Tensor:
        score = a.float() * weight_I
        if not torch.isfinite(score).all():
            raise DataError("the calibration activations hold infinities or NaN: the model overflows in this dtype.")
        return score.reshape(-1).view(torch.int32)

    def count(bins: Iterable[Tensor]) -> Tensor:
        return sum(everyones(sum(torch.bincount(b, minlength=65536) for b in bins).cpu())).cumsum(0)

    total = sum(everyones(sum(a.numel() for a in a_TI)))
    high = count(bits(a) >> 16 for a in a_TI)
    rank = torch.tensor(math.ceil(q * total))
    top = int(torch.searchsorted(high, rank))
    below = int(high[top - 1]) if top else 0
    low = below + count(b[b >> 16 == top] & 0xFFFF for b in map(bits, a_TI))
    bottom = int(torch.searchsorted(low, rank))
    before = int(low[bottom - 1]) if bottom else below
    if (
        q * total - before < int(low[bottom]) - q * total
    ):  # ties at t overshoot by more than leaving them all out would fall short
        below_t = [s for s in (_largest_below(bits(a), (top << 16) | bottom) for a in a_TI) if s is not None]
        code = max(chain(*everyones(below_t)), default=None)
        if code is None:  # nothing lies below: drop nothing rather than everything
            return -1.0
    else:
        code = (top << 16) | bottom
    return torch.tensor(code, dtype=torch.int32).view(torch.float32).item()


def _largest_below(bits: Tensor, code: int) -> int | None:
    bits = bits[bits < code]
    return int(bits.max()) if bits.numel() else None


def thresholds(scores_TU: Sequence[Tensor], weight_U: Tensor, sparsity: float) -> tuple[float, float, Tensor]:
    """Per-unit thresholds that drop a share of all scores, where unit u is dropped iff score <= threshold_u.

    Args:
        scores_TU: batches of [T, U], >= 0.
        weight_U: what a score of each unit counts for; a unit's threshold is the common one over its weight.
        sparsity: the share, in [0, 1); at 0 nothing is dropped.

    Returns:
        The common threshold, the share that is dropped, and the thresholds [U] in the dtype of the scores, none of
        them beyond `LARGEST`.
    """
    if sparsity == 0:
        return -1.0, 0.0, torch.full_like(weight_U, -1, dtype=scores_TU[0].dtype)
    common = quantile(scores_TU, weight_U, sparsity)
    # A unit of weight 0 has scores of 0, which are dropped: where the common threshold is 0 too, that is 0 / 0.
    threshold_U = (common / weight_U).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST).to(scores_TU[0].dtype)
    dropped = sum(everyones(sum(int((s <= threshold_U).sum()) for s in scores_TU)))
    return common, dropped / sum(everyones(sum(s.numel() for s in scores_TU))), threshold_U
