"""Rank-aware input sparsity: small input channels of a linear layer pass through a low-rank form of its weight.

Paper: R-Sparse, Zhang et al., ICLR 2025, arXiv 2504.19449. y = W x_kept + B A x_dropped, a channel kept iff |x_i| > t
as in TEAL; of the bytes read, a share alpha goes to columns of W and the rest to the two factors. No retraining.
Differs: alpha is searched for site by site, by the error of the site's output on calibration text (theirs: an
evolutionary search over all sites at once); the factors are the best ones for what is dropped there, the principal
directions of W x_dropped (theirs: the singular vectors of W, here `factors="weight"`); what the rank costs is counted
by the real shape of W (theirs takes k and v of grouped-query attention for square); every token is sparse.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sandcat.errors import BadRecipe
from sandcat.layers.low_rank_linear import LowRankLinear
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.weights import stored_of
from sandcat.method import Method, Seen, Spec, Tensors, check_sites, pick_kinds
from sandcat.models.view import ModelView, Site
from sandcat.quantile import thresholds
from sandcat.support.options import option
from sandcat.support.processes import alone, in_order

ALPHAS = (1.0, 0.95, 0.9, 0.8, 0.6)
SEARCH_TOKENS = 2048
"""Calibration tokens on which each alpha is tried."""


@dataclass(frozen=True, kw_only=True)
class Rsparse(Method):
    """y = W x_kept + B (A x_dropped), at any of the linear layers of a decoder layer."""

    name = "rsparse"
    slot = "input"

    sparsity: float = option(0.4, "fraction of each site's weight bytes not read on calibration text, in [0, 1)")
    alpha: str | tuple[float, ...] = option(
        "search", 'share of the bytes read that goes to kept channels: "search", or a list to choose from, as [0.9,1]'
    )
    factors: Literal["output", "weight"] = option(
        "output",
        "output: principal directions of what dropped channels add; weight: of W, the paper's singular vectors",
    )
    sites: str | tuple[str, ...] = option("all", 'linear layers to change: "all", or a list [q,k,v,o,gate,up,down]')
    dense_prompt: bool = option(False, "compute the tokens of prompts with all channels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise BadRecipe(f"rsparse: sparsity={self.sparsity} is outside [0, 1): it is the fraction of bytes saved.")
        if self.alpha != "search" and (
            isinstance(self.alpha, str) or not self.alpha or not all(0 < a <= 1 for a in self.alpha)
        ):
            raise BadRecipe(f'rsparse: alpha={self.alpha!r} is neither "search" nor a list of shares in (0, 1].')
        check_sites(self.name, self.sites)

    def kinds(self, view: ModelView) -> Collection[str]:
        return pick_kinds(self.name, self.sites, list(view.linear_kinds), view.config.model_type)

    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        weight_OI = stored_of(site.module).float()
        outputs, channels = weight_OI.shape
        ones_I, read = torch.ones(channels, device=weight_OI.device), 1 - self.sparsity
        one_rank = (outputs + channels) * seen.inputs[0].itemsize
        sample_TI = torch.cat([x.to(weight_OI.device) for x in in_order([x.cpu() for x in seen.inputs])])
        sample_TI = sample_TI[:: -(-len(sample_TI) // SEARCH_TOKENS)]
        tried = []
        for alpha in ALPHAS if isinstance(self.alpha, str) else self.alpha:
            rank = int((1 - alpha) * read * site.module.weight.nbytes / one_rank)
            target = 1 - read + rank * one_rank / site.module.weight.nbytes  # ranks are whole, channels take the rest
            with alone():  # all processes have the sample
                _, _, threshold_I = thresholds([sample_TI.abs()], ones_I, target)
            dropped_TI = torch.where(sample_TI.abs() <= threshold_I, sample_TI, 0).float()
            lost_TO = dropped_TI @ weight_OI.t()
            of_what = lost_TO.t() if self.factors == "output" else weight_OI
            b_OR = principal_directions(of_what @ of_what.t(), rank)
            error = float((lost_TO - lost_TO @ b_OR @ b_OR.t()).square().sum())
            tried.append((error, rank, target, b_OR))
        _, rank, target, b_OR = min(tried, key=lambda row: row[:2])
        common, dropped, threshold_I = thresholds([x.abs() for x in seen.inputs], ones_I, target)
        factors = {"factor_a": b_OR.t() @ weight_OI, "factor_b": b_OR} if rank else {}
        spec = {"threshold": common, "target": target, "sparsity": dropped, "rank": rank}
        return spec, {"threshold": threshold_I, **factors}

    def limits(self, site: Site) -> dict[str, tuple[int, int]]:
        return {"rank": (0, min(site.module.in_features, site.module.out_features))}

    def bytes_read(self, site: Site) -> int:
        return SparseLinear(site.module).weight_bytes(1 - self.sparsity)  # its factors are within the budget

    def build(self, site: Site, spec: Spec) -> SparseLinear:
        if spec["rank"] == 0:
            return SparseLinear(site.module, dense_prompt=self.dense_prompt)
        return LowRankLinear(site.module, rank=spec["rank"], dense_prompt=self.dense_prompt)


def principal_directions(gram_OO: Tensor, rank: int) -> Tensor:
    """The first eigenvectors of a Gram matrix, [O, R], by subspace iteration: all of them would take minutes."""
    size = len(gram_OO)
    start = torch.randn(size, min(size, rank + 16), generator=torch.Generator().manual_seed(0))
    q_OK = start.to(gram_OO)
    for _ in range(4):
        q_OK = torch.linalg.qr(gram_OO @ q_OK).Q
    return q_OK @ torch.linalg.eigh(q_OK.t() @ gram_OO @ q_OK).eigenvectors.flip(-1)[:, :rank]
