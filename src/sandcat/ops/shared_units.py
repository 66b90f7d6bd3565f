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
    B, U = len(scores), len(threshold_U)
    inverse_U = 1 / threshold_U.float().clamp(min=LEAST_THRESHOLD)
    total = reduce(torch.add, ((s.float() * inverse_U).square() for s in scores))  # in this order, as the kernel adds
    total = torch.where(total.isnan(), torch.inf, total)
    kept = (~(scores <= threshold_U)).sum(0)
    total_gu = F.pad(total, (0, -U % GROUP), value=-1).unflatten(-1, (-1, GROUP))
    kept_g = F.pad(kept, (0, -U % GROUP)).unflatten(-1, (-1, GROUP)).sum(-1, keepdim=True)
    place_gu = total_gu.argsort(stable=True, dim=-1, descending=True).argsort(-1)
    count_g = (2 * kept_g + B - 1 + kept_g // B % 2) // (2 * B)
    return (place_gu < count_g).flatten(-2)[..., :U]


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
