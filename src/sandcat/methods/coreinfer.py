"""Sentence-level core neurons: the prompt chooses neurons once, and decoding computes no others.

Paper: CoreInfer, Wang et al., 2024, arXiv 2410.18311. Each token of the prompt votes for the neurons that it excites
most; the ones with most votes are the sentence's core, fixed for all tokens after it (`rule="stability"`). Or the core
of the nearest of some clusters of calibration sentences is taken (`rule="similarity"`). The prompt is computed whole.
Differs: any gated family and batch, each sequence with a core of its own and padding without a vote; nothing is copied:
a kernel reads the core's rows where they lie; neurons with as many votes are told apart by what they give in all;
clusters are found in each layer for itself (theirs: in one layer, for all); all layers by default (theirs: 6 to 26 of
32, here `layers`); and `score="absolute"`, by which large negative values count too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sandcat.errors import BadRecipe
from sandcat.layers.core_mlp import CoreMLP, told_apart
from sandcat.method import Method, Seen, Spec, Tensors
from sandcat.models.view import ModelView, Site
from sandcat.support.options import option
from sandcat.support.processes import in_order

SENTENCE = 64
"""Tokens of calibration text that make a sentence to be clustered."""
CLUSTERS = 1024
"""At most, as each is a row of numbers in every layer."""
ROUNDS = 10
"""Rounds of k-means."""


@dataclass(frozen=True, kw_only=True)
class Coreinfer(Method):
    """MLP(x) over the neurons that the prompt chose, of gate, up and down alike."""

    name = "coreinfer"
    slot = "input"

    sparsity: float = option(0.6, "fraction of each layer's neurons that decoding leaves out, in [0, 1)")
    votes: float = option(0.2, "fraction of the neurons that each token of the prompt votes for, in (0, 1]")
    score: Literal["signed", "absolute"] = option(
        "signed", "what a token votes by: signed: the value act(gate) * up, the paper's; absolute: its magnitude"
    )
    rule: Literal["stability", "similarity"] = option(
        "stability", "stability: the prompt's own first neurons; similarity: those of the nearest cluster of sentences"
    )
    clusters: int = option(16, "clusters of calibration sentences in each layer, for rule=similarity")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise BadRecipe(
                f"coreinfer: sparsity={self.sparsity} is outside [0, 1): it is the fraction of neurons left out."
            )
        if not 0 < self.votes <= 1:
            raise BadRecipe(f"coreinfer: votes={self.votes} is outside (0, 1]: it is a fraction of the neurons.")
        if not 1 <= self.clusters <= CLUSTERS:
            raise BadRecipe(f"coreinfer: clusters={self.clusters}: give 1 to {CLUSTERS}.")

    @property
    def needs(self) -> frozenset[str]:
        return super().needs if self.rule == "similarity" else frozenset()

    def claims(self, view: ModelView, site: Site) -> list[str]:
        return list(view.linears_of(site))  # the gate too

    def bytes_read(self, site: Site) -> int:
        spec = self._spec(site)
        return self.build(site, spec).weight_bytes(1 - spec["sparsity"])

    def _spec(self, site: Site) -> Spec:
        neurons = getattr(site.module, site.architecture.down).in_features
        kept = max(1, round((1 - self.sparsity) * neurons))
        return {"kept_neurons": kept, "sparsity": 1 - kept / neurons}

    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        spec = self._spec(site)
        if not self.calibrated:
            return spec, {}
        module = self.build(site, spec)
        votes_SI = torch.cat(in_order([_sentence_votes(module, x).cpu() for x in seen.inputs])).to(
            seen.inputs[0].device
        )
        return spec, {"centres": centres_of(votes_SI, self.clusters)}

    def limits(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"kept_neurons": (1, getattr(site.module, site.architecture.down).in_features)}

    def build(self, site: Site, spec: Spec) -> CoreMLP:
        return CoreMLP(
            site, kept_neurons=spec["kept_neurons"], votes=self.votes, signed=self.score == "signed",
            clusters=self.clusters if self.calibrated else 0,
        )  # fmt: skip


def _sentence_votes(module: CoreMLP, x_TH: Tensor) -> Tensor:
    """The votes of each run of `SENTENCE` tokens, as shares of its tokens, [S, I]."""
    x_STH = x_TH[: len(x_TH) // SENTENCE * SENTENCE].view(-1, SENTENCE, x_TH.shape[-1])
    return told_apart(*module.count_votes(module.values(x_STH))) / SENTENCE


def centres_of(votes_SI: Tensor, clusters: int) -> Tensor:
    """The mean votes of each cluster of sentences, by k-means on their directions, [C, I].

    It starts from the sentence nearest to all, and then from the farthest from those taken: nothing is drawn at random.
    With fewer sentences than clusters the last centres repeat the first.
    """
    unit_SI = F.normalize(votes_SI, dim=-1)
    near_S = unit_SI @ unit_SI.mean(0)
    taken = [int(near_S.argmax())]
    closest_S = unit_SI @ unit_SI[taken[0]]
    while len(taken) < clusters:
        taken.append(int(closest_S.argmin()))
        closest_S = torch.maximum(closest_S, unit_SI @ unit_SI[taken[-1]])
    centres_CI = votes_SI[taken]
    for _ in range(ROUNDS):
        own_S = (unit_SI @ F.normalize(centres_CI, dim=-1).t()).argmax(-1)
        one_hot_SC = F.one_hot(own_S, clusters).to(votes_SI)
        size_C = one_hot_SC.sum(0)
        means_CI = one_hot_SC.t() @ votes_SI / size_C.clamp(min=1)[:, None]
        centres_CI = torch.where(size_C[:, None] > 0, means_CI, centres_CI)
    return centres_CI
