"""A gated MLP whose neurons are chosen once a prompt.

Shapes: B sequences, T tokens a sequence, H hidden size, I neurons, C clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sandcat.errors import GenerationError, UnsupportedModel
from sandcat.layers.reading import Prompt
from sandcat.layers.sparse_mlp import GatedMLP
from sandcat.layers.weights import stored_of
from sandcat.models.view import Site
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.checks import PROMPT_CHUNK
from sandcat.ops.core_mlp import core_mlp, reference
from sandcat.ops.weights import product


class CoreMLP(GatedMLP):
    """Computes prompts with all neurons, counts which ones their tokens excite, and goes on with the first of those.

    Args:
        kept_neurons: how many it goes on with.
        votes: the share of the neurons that each token of a prompt votes for.
        signed: a token votes for the largest values instead of the largest magnitudes.
        clusters: how many kinds of prompts it knows; it goes on with the neurons of the nearest one. 0: with its own.
        site: see `GatedMLP`.
    """

    op = "core_mlp"
    chooses_in_prompt = True

    def __init__(self, site: Site, *, kept_neurons: int, votes: float, signed: bool, clusters: int = 0):
        super().__init__(site, dense_prompt=True)
        self.layer, self.kept_neurons, self.votes, self.signed = site.layer, kept_neurons, votes, signed
        if clusters:
            self.register_buffer(
                "centres", stored_of(self.down).like.detach().new_zeros(clusters, self.down.in_features)
            )

    def run(self, x: Tensor) -> Tensor:
        if self.adapted:
            raise UnsupportedModel(
                "coreinfer reads the weights of gate, up and down itself, and passes over what stands around them. Put "
                "adapters on q, k, v and o, or merge them before sparsifying; load without offloading."
            )
        reading = self.reading()
        if reading is None:  # not part of a whole model yet
            return self._whole(x)[0]
        kept, real_BT = reading.kept, reading.real_BT
        y = []
        if first := reading.first:
            found, *votes = self._whole(x[:, :first], None if real_BT is None else real_BT[:, :first])
            if not reading.again:
                self._vote(kept, *votes)
            y.append(found)
        if first < x.shape[1]:
            y.append(self._by_core(x[:, first:], kept.cores[self.layer]))
        return y[0] if len(y) == 1 else torch.cat(y, 1)

    def _vote(self, kept: Prompt, votes_BI: Tensor, sums_BI: Tensor) -> None:
        """Adds the votes of a part of a prompt to those of the parts before it, and chooses by all of them."""
        if self.layer in kept.votes:
            before_BI, sums_before_BI = kept.votes[self.layer]
            self._check_prompts(before_BI, len(votes_BI))
            votes_BI, sums_BI = before_BI + votes_BI, sums_before_BI + sums_BI
        kept.votes[self.layer] = votes_BI, sums_BI
        core_BI, cores = self.core(told_apart(votes_BI, sums_BI)), kept.cores
        if self.layer in cores and cores[self.layer].shape == core_BI.shape:
            cores[self.layer].copy_(core_BI)  # where a captured graph looks for it
        else:
            with torch.inference_mode(False):  # so that it can be overwritten in any mode
                cores[self.layer] = torch.empty_like(core_BI).copy_(core_BI)

    def _whole(self, x: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The dense MLP, and the votes of the tokens that are no padding."""
        y, votes_BI, sums_BI = [], 0, 0
        for first in range(0, x.shape[1], PROMPT_CHUNK):
            part = slice(first, first + PROMPT_CHUNK)
            h_BTI = self.values(x[:, part])
            y.append(product(h_BTI, stored_of(self.down)))
            votes, sums = self.count_votes(h_BTI, None if real_BT is None else real_BT[:, part])
            votes_BI, sums_BI = votes_BI + votes, sums_BI + sums
        return torch.cat(y, 1), votes_BI, sums_BI

    def values(self, x: Tensor) -> Tensor:
        """act(gate) * up of every neuron."""
        return ACTIVATIONS[self.activation](product(x, self.gate())) * product(x, self.up())

    def count_votes(self, h_BTI: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """For each neuron the number of tokens that have it among their first, and the sum of what it scores, both
        float32 [B, I]."""
        score_BTI = (h_BTI if self.signed else h_BTI.abs()).float().clamp(min=0)
        if real_BT is not None:
            score_BTI = score_BTI * real_BT[..., None]
        count = max(1, round(self.votes * score_BTI.shape[-1]))
        least_BT1 = score_BTI.topk(count, -1).values[..., -1:]
        return ((score_BTI >= least_BT1) & (score_BTI > 0)).sum(1).float(), score_BTI.sum(1)

    def core(self, votes_BI: Tensor) -> Tensor:
        """The neurons to go on with, bool [B, I]."""
        if "centres" in self._buffers:
            centres_CI = self.centres.float()
            near_BC = F.normalize(votes_BI, dim=-1) @ F.normalize(centres_CI, dim=-1).t()
            votes_BI = centres_CI[near_BC.argmax(-1)]
        first_BK = votes_BI.argsort(dim=-1, descending=True, stable=True)[
            :, : self.kept_neurons
        ]  # equals: in their order
        return torch.zeros_like(votes_BI, dtype=torch.bool).scatter(-1, first_BK, True)

    def _by_core(self, x: Tensor, core_BI: Tensor) -> Tensor:
        self._check_prompts(core_BI, len(x))
        core_TI = core_BI.repeat_interleave(x.shape[1], 0)
        x_TH = x.reshape(-1, x.shape[-1])
        run = self.by_kernel if self.pays(x_TH) and not self.by_reference else self.by_definition
        y_TH = [
            run(part, core).to(x.dtype)
            for part, core in zip(x_TH.split(PROMPT_CHUNK), core_TI.split(PROMPT_CHUNK), strict=True)
        ]
        return torch.cat(y_TH).view(x.shape)

    def _check_prompts(self, kept_BI: Tensor, sequences: int) -> None:
        if len(kept_BI) != sequences:
            raise GenerationError(
                f"this cache's core neurons are those of {len(kept_BI)} prompts, and {sequences} sequences go on with "
                "it. Give the sequences their own prompts, with an empty cache."
            )

    def by_kernel(self, x_TH: Tensor, core_TI: Tensor) -> Tensor:  # type: ignore[override]
        return core_mlp(*self._arguments(x_TH, core_TI))

    def by_definition(self, x_TH: Tensor, core_TI: Tensor) -> Tensor:  # type: ignore[override]
        return reference(*self._arguments(x_TH, core_TI))

    def _arguments(self, x_TH: Tensor, core_TI: Tensor) -> tuple:
        return x_TH, self.gate(), self.up(), stored_of(self.down), core_TI, self.activation

    def kept(self, x: Tensor) -> Tensor:
        """The core of what the running forward goes on with, which a token after its prompt keeps."""
        reading = self.reading()
        assert reading is not None  # it is asked within a forward
        return reading.kept.cores[self.layer][:, None].expand(-1, x.shape[1], -1)

    def weight_bytes(self, kept: float = 1.0) -> int:
        matrices = (self.gate(), self.up(), stored_of(self.down))
        return sum(m.small_bytes() for m in matrices) + round(kept * sum(m.codes.nbytes for m in matrices))

    def extra_repr(self) -> str:
        return f"kept_neurons={self.kept_neurons}, votes={self.votes}, signed={self.signed}, {super().extra_repr()}"


def told_apart(votes_BI: Tensor, sums_BI: Tensor) -> Tensor:
    """Votes in which neurons that have as many differ by less than one: by what they score in all."""
    return votes_BI + sums_BI / (2 * sums_BI.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
