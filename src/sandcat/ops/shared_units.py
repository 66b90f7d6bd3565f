"""Units that the sequences of a decode step share: one list for all of them, as long as what one of them keeps. The ops
`sandcat::shared_linear` (input channels) and `sandcat::shared_up_down` (neurons).

Shapes: B sequences, one token each, U units; I, O, H and the layouts of weights as in sparse_linear.py and
sparse_mlp.py. The references take more dimensions after B, as [B, T, I], and choose for each place of them: T steps.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from sandcat.ops.op import Op
from sandcat.ops.weights import Stored, product

GROUP = 16
"""Neighbouring units among which those that are shared are chosen."""
LEAST_THRESHOLD = 1e-15
"""Thresholds below count as this one, so that units which nothing but 0 drops are still told apart."""


def shared_units(scores: Tensor, threshold_U: Tensor) -> Tensor:
    """Which units all sequences use, bool [..., U], from what the thresholds are compared with, [B, ..., U].

    Of every `GROUP` neighbouring units they are the first k by the sum over sequences of (score / threshold)^2, where k
    is how many of them a sequence keeps by its own thresholds, on average and rounded, halves to the even number; among
    equals the first ones. A NaN comes before all.
    """
    total_gu, count_g = _ranked(scores, threshold_U)
    place_gu = total_gu.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    return (place_gu < count_g).flatten(-2)[..., : len(threshold_U)]


def near_the_cut(scores: Tensor, threshold_U: Tensor, margin_U: Tensor) -> Tensor:
    """Units, bool [..., U], that `shared_units` might have decided otherwise over if scores were off by the margins."""
    total_gu, count_g = _ranked(scores, threshold_U)
    size_gu = total_gu.clamp(min=0).sqrt()
    ordered_gu = size_gu.sort(dim=-1, descending=True).values
    last_g = ordered_gu.gather(-1, (count_g - 1).clamp(min=0))
    first_g = ordered_gu.gather(-1, count_g.clamp(max=GROUP - 1))
    off_U = torch.where(threshold_U > 0, margin_U / threshold_U.float().clamp(min=LEAST_THRESHOLD), 0)
    off_g = 2 * len(scores) ** 0.5 * _grouped(off_U, 0).amax(-1, keepdim=True)  # of two units, and of all sequences
    near_gu = (size_gu - first_g <= off_g) & (last_g - size_gu <= off_g) & (count_g > 0) & (count_g < GROUP)
    return near_gu.flatten(-2)[..., : len(threshold_U)]


def _ranked(scores: Tensor, threshold_U: Tensor) -> tuple[Tensor, Tensor]:
    """By what units of a group come first, [..., groups, GROUP], and how many of them are shared, [..., groups, 1]."""
    B, inverse_U = len(scores), 1 / threshold_U.float().clamp(min=LEAST_THRESHOLD)
    total = reduce(torch.add, ((s.float() * inverse_U).square() for s in scores))  # in this order, as the kernel adds
    total = torch.where(total.isnan(), torch.inf, total)
    kept_g = _grouped((~(scores <= threshold_U)).sum(0), 0).sum(-1, keepdim=True)
    return _grouped(total, -1), (2 * kept_g + B - 1 + kept_g // B % 2) // (2 * B)


def _grouped(values: Tensor, rest: float) -> Tensor:
    return F.pad(values, (0, -values.shape[-1] % GROUP), value=rest).unflatten(-1, (-1, GROUP))


def reference_linear(x_BI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    """The definition: a linear layer of the channels that are shared by |x|. Returns float32 [B, ..., O]."""
    return product(torch.where(shared_units(x_BI.abs(), threshold_I), x_BI, 0), weight).float()


def reference_up_down(x_BH: Tensor, a_BI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    """The definition: an MLP, from what its gate gave, of the neurons that are shared by |a|. float32 [B, ..., H]."""
    units = shared_units(a_BI.abs(), threshold_I)
    return product(torch.where(units, a_BI * product(x_BH, up), 0), down).float()


shared_linear = Op("shared_linear", reference_linear)
"""`reference_linear` for 1 to `MAX_TOKENS` sequences, by the kernel of the device where there is one."""


@shared_linear.register_fake
def _(x_BI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    return x_BI.new_empty((x_BI.shape[0], weight.codes.shape[0]), dtype=torch.float32)


shared_up_down = Op("shared_up_down", reference_up_down)
"""`reference_up_down` for 1 to `MAX_TOKENS` sequences, by the kernel of the device where there is one."""


@shared_up_down.register_fake
def _(x_BH: Tensor, a_BI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    return x_BH.new_empty((x_BH.shape[0], down.codes.shape[0]), dtype=torch.float32)
