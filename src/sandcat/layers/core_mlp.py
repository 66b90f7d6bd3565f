"""A gated MLP whose neurons are chosen once a prompt; and which prompt each forward of a model belongs to.

Shapes: B sequences, T tokens a sequence, H hidden size, I neurons, C clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandcat.errors import GenerationError, UnsupportedModel
from sandcat.layers.prompts import Prompts
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
        self.prompt_tokens = 1
        self.prompts: Prompts | None = None
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
        prompts = self.prompts
        if prompts is None:  # not part of a whole model yet
            return self._whole(x)[0]
        prompts.check_thread()
        cores = prompts.cores
        if not prompts.fresh:
            return self._by_core(x, cores[self.layer])
        real_BT = prompts.real
        split = self.prompt_tokens if prompts.cacheless and not self.dense_prompt else x.shape[1]
        y, votes_BI = self._whole(x[:, :split], None if real_BT is None else real_BT[:, :split])
        core_BI = self.core(votes_BI)
        if self.layer in cores and cores[self.layer].shape == core_BI.shape:
            cores[self.layer].copy_(core_BI)  # where a captured graph looks for it
        else:
            with torch.inference_mode(False):  # so that it can be overwritten in any mode
                cores[self.layer] = torch.empty_like(core_BI).copy_(core_BI)
        return y if split >= x.shape[1] else torch.cat([y, self._by_core(x[:, split:], core_BI)], 1)

    def _whole(self, x: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The dense MLP, and the votes of the tokens that are no padding."""
        y, votes_BI = [], 0
        for first in range(0, x.shape[1], PROMPT_CHUNK):
            part = slice(first, first + PROMPT_CHUNK)
            h_BTI = self.values(x[:, part])
            y.append(product(h_BTI, stored_of(self.down)))
            votes_BI = votes_BI + self.count_votes(h_BTI, None if real_BT is None else real_BT[:, part])
        return torch.cat(y, 1), votes_BI

    def values(self, x: Tensor) -> Tensor:
        """act(gate) * up of every neuron."""
        return ACTIVATIONS[self.activation](product(x, self.gate())) * product(x, self.up())

    def count_votes(self, h_BTI: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """For each neuron the number of tokens that have it among their first, as float32 [B, I].

        Neurons with as many votes are told apart by less than a vote: by what they give in all.
        """
        score_BTI = (h_BTI if self.signed else h_BTI.abs()).float().clamp(min=0)
        if real_BT is not None:
            score_BTI = score_BTI * real_BT[..., None]
        count = max(1, round(self.votes * score_BTI.shape[-1]))
        least_BT1 = score_BTI.topk(count, -1).values[..., -1:]
        votes_BI = ((score_BTI >= least_BT1) & (score_BTI > 0)).sum(1)
        sum_BI = score_BTI.sum(1)
        return votes_BI + sum_BI / (2 * sum_BI.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))

    def core(self, votes_BI: Tensor) -> Tensor:
        """The neurons to go on with, bool [B, I]."""
        if "centres" in self._buffers:
            centres_CI = self.centres.float()
            near_BC = F.normalize(votes_BI, dim=-1) @ F.normalize(centres_CI, dim=-1).t()
            votes_BI = centres_CI[near_BC.argmax(-1)]
        first_BK = votes_BI.topk(self.kept_neurons, -1).indices
        return torch.zeros_like(votes_BI, dtype=torch.bool).scatter(-1, first_BK, True)

    def _by_core(self, x: Tensor, core_BI: Tensor) -> Tensor:
        if len(core_BI) != len(x):
            raise GenerationError(
                f"this cache's core neurons are those of {len(core_BI)} prompts, and {len(x)} sequences go on with it. "
                "Give the sequences their own prompts, with an empty cache."
            )
        if self.runs_dense(x):
            return self.dense_step(x)
        core_TI = core_BI.repeat_interleave(x.shape[1], 0)
        x_TH = x.reshape(-1, x.shape[-1])
        run = self.by_kernel if self.pays(x_TH) and not self.by_reference else self.by_definition
        y_TH = [
            run(part, core).to(x.dtype)
            for part, core in zip(x_TH.split(PROMPT_CHUNK), core_TI.split(PROMPT_CHUNK), strict=True)
        ]
        return torch.cat(y_TH).view(x.shape)

    def by_kernel(self, x_TH: Tensor, core_TI: Tensor) -> Tensor:  # type: ignore[override]
        if not self.packed:
            self.pack()
        return core_mlp(*self._arguments(x_TH, core_TI))

    def by_definition(self, x_TH: Tensor, core_TI: Tensor) -> Tensor:  # type: ignore[override]
        return reference(*self._arguments(x_TH, core_TI))

    def _arguments(self, x_TH: Tensor, core_TI: Tensor) -> tuple:
        return x_TH, self.gate(), self.up(), stored_of(self.down), core_TI, self.activation

    def kept(self, x: Tensor) -> Tensor:
        """The core of the last forward, which a token after its prompt keeps."""
        assert self.prompts is not None  # it has run
        core_BI = self.prompts.cores[self.layer]
        return core_BI[:, None].expand(-1, x.shape[1], -1)

    def weight_bytes(self, kept: float = 1.0) -> int:
        matrices = (self.gate(), self.up(), stored_of(self.down))
        return sum(m.small_bytes() for m in matrices) + round(kept * sum(m.codes.nbytes for m in matrices))

    def extra_repr(self) -> str:
        return f"kept_neurons={self.kept_neurons}, votes={self.votes}, signed={self.signed}, {super().extra_repr()}"


def follow_prompts(decoder: nn.Module) -> None:
    """Ties the `CoreMLP`s inside a decoder to its forwards."""
    modules = [module for module in decoder.modules() if isinstance(module, CoreMLP)]
    if not modules:
        return
    prompts = Prompts()
    decoder.register_forward_pre_hook(prompts.enter, with_kwargs=True)
    decoder.register_forward_hook(prompts.leave)
    for module in modules:
        module.prompts = prompts
