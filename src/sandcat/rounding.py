"""What methods have in common that store weights as codes: one scale an output channel, and each weight rounded to the
nearest code.

W[o] ~ scale[o] * codes[o]. Activations are not rounded, and sums are float32. What is skipped stacks on it without
error, as a scale belongs to an output and is applied once at the end; all thresholds are calibrated on the weights as
stored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sandcat.layers.stored_linear import StoredLinear
from sandcat.method import Method, Seen, Spec, Tensors, check_sites, pick_kinds
from sandcat.models.view import ModelView, Site
from sandcat.ops.weights import FORMATS
from sandcat.support.options import option
from sandcat.support.processes import total

CLIPS = tuple(1 - 0.02 * step for step in range(11))
"""Shares of a row's largest weight that the largest code may stand for."""
ROWS = 4096
"""Rows of a weight that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class Rounding(Method):
    """y = scale * (x codes^T), at any of the linear layers of a decoder layer and at the head."""

    format: ClassVar[str]
    slot = "weight"
    served = "codes"

    sites: str | tuple[str, ...] = option(
        "all", 'linear layers to change: "all", or a list [q,k,v,o,gate,up,down,head]; the head is in no layer'
    )
    clip: Literal["none", "search"] = option(
        "none", "none: the largest weight of a row has the largest code; search: clip a row if its output gains by it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sites(self.name, self.sites)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs if self.clip == "search" else frozenset()

    def kinds(self, view: ModelView) -> Collection[str]:
        return pick_kinds(self.name, self.sites, [*view.linear_kinds, "head"], view.config.model_type)

    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        weight_OI = site.module.weight
        moment_II = total(lambda x: x.float().t() @ x.float(), seen.inputs) if seen.inputs else None
        parts = [quantised(part, moment_II, format=self.format) for part in weight_OI.split(ROWS)]
        codes_OI, scale_O1 = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        largest = FORMATS[self.format].largest
        clipped = scale_O1.float() * largest < 0.99 * weight_OI.abs().amax(1, keepdim=True).float()
        return {"clipped": float(clipped.float().mean())}, {"weight": codes_OI, "weight_scale": scale_O1}

    def build(self, site: Site, spec: Spec) -> StoredLinear:
        return StoredLinear(site.module, self.format)


def quantised(weight_OI: Tensor, moment_II: Tensor | None = None, *, format: str = "int8") -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, 1] in the weight's dtype.

    Args:
        moment_II: sum of x x^T over inputs; with it, each row gets the scale of least squared output error.
        format: a name of `FORMATS` that has codes.
    """
    weight, top_O1, row = weight_OI.float(), weight_OI.float().abs().amax(1, keepdim=True), FORMATS[format]

    def at(clip: float) -> tuple[Tensor, Tensor]:
        scale = (top_O1 * (clip / row.largest)).to(weight_OI.dtype)  # rounded first, so that the codes make up for it
        scale = torch.where(scale > 0, scale, 1)
        return row.nearest(weight / scale.float()), scale

    best, least_O1 = at(CLIPS[0]), None
    for clip in CLIPS if moment_II is not None else ():
        codes, scale = at(clip)
        wrong = codes.float() * scale.float() - weight
        error_O1 = ((wrong @ moment_II) * wrong).sum(1, keepdim=True)
        better = error_O1 < (torch.inf if least_O1 is None else least_O1)
        best = where(better, codes, best[0]), torch.where(better, scale, best[1])
        least_O1 = error_O1 if least_O1 is None else torch.minimum(error_O1, least_O1)
    return best


def where(condition: Tensor, codes: Tensor, others: Tensor) -> Tensor:
    """`torch.where` of codes of one byte, by their bits."""
    return torch.where(condition, codes.view(torch.int8), others.view(torch.int8)).view(codes.dtype)
