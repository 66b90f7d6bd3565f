"""Int8 weights: half the bytes of bfloat16 for every token, whatever the context.

Source: round to nearest, symmetric, one scale an output channel, as LLM.int8() (Dettmers et al., 2022, arXiv
2208.07339) stores its weights; `clip=search` as AWQ and OmniQuant search it. W[o] ~ scale[o] * codes[o], codes in
[-127, 127]. Activations are not quantised, and sums are float32.
Differs: what is skipped stacks on it without error, as a scale belongs to an output and is applied once at the end; all
thresholds are calibrated on the int8 weights. The head is quantised too: with tied embeddings it gets an int8 copy of
its own beside the table, which costs memory and saves bytes a token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sandcat.layers.stored_linear import Int8Linear
from sandcat.method import Method, Seen, Spec, Tensors, check_sites, pick_kinds
from sandcat.models.view import ModelView, Site
from sandcat.support.options import option
from sandcat.support.processes import total

CLIPS = tuple(1 - 0.02 * step for step in range(11))
"""Shares of a row's largest weight that the largest code may stand for."""
ROWS = 4096
"""Rows of a weight that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """y = scale * (x codes^T), at any of the linear layers of a decoder layer and at the head."""

    name = "int8"
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
        parts = [quantised(part, moment_II) for part in weight_OI.split(ROWS)]
        codes_OI, scale_O1 = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        clipped = scale_O1.float() * 127 < 0.99 * weight_OI.abs().amax(1, keepdim=True).float()
        return {"clipped": float(clipped.float().mean())}, {"weight": codes_OI, "weight_scale": scale_O1}

    def build(self, site: Site, spec: Spec) -> Int8Linear:
        return Int8Linear(site.module)


def quantised(weight_OI: Tensor, moment_II: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O, 1] in the weight's dtype.

    Args:
        moment_II: sum of x x^T over inputs; with it, each row gets the scale of least squared output error.
    """
    weight, top_O1 = weight_OI.float(), weight_OI.float().abs().amax(1, keepdim=True)

    def at(clip: float) -> tuple[Tensor, Tensor]:
        scale = (top_O1 * (clip / 127)).to(weight_OI.dtype)  # rounded first, so that the codes make up for it
        scale = torch.where(scale > 0, scale, 1)
        return (weight / scale.float()).round().clamp(-127, 127).to(torch.int8), scale

    best, least_O1 = at(CLIPS[0]), None
    for clip in CLIPS if moment_II is not None else ():
        found = at(clip)
        wrong = found[0] * found[1].float() - weight
        error_O1 = ((wrong @ moment_II) * wrong).sum(1, keepdim=True)
        better = error_O1 < (torch.inf if least_O1 is None else least_O1)
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        least_O1 = error_O1 if least_O1 is None else torch.minimum(error_O1, least_O1)
    return best
