"""Input sparsity: an input channel of a linear layer that is small for this token is not computed.

Paper: TEAL, Liu et al., 2024, arXiv 2408.14690. Channel i of a token is kept iff |x_i| > t, where t is the s-quantile
of |x| at this layer over calibration text; a dropped channel's column of W is never read. No retraining.
Differs: exact quantiles (theirs come from histograms); padding and the first positions excluded; each layer is
calibrated on what the sparse layers before it give; prompts are sparse in full (theirs: the second half); one sparsity
for all sites, or what `allocate` gives each (theirs are searched block by block); the head can be a site; and
`score="output"`, the weighting of WINA (arXiv 2505.19427): a channel counts for |x_i| times the norm of its column.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch

from sandcat.errors import BadRecipe
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.weights import stored_of
from sandcat.method import Method, Seen, Spec, Tensors, check_sites, pick_kinds
from sandcat.models.view import ModelView, Site
from sandcat.quantile import thresholds
from sandcat.support.options import option


@dataclass(frozen=True, kw_only=True)
class Teal(Method):
    """y = sum of x_i W[:, i] over the channels with |x_i| > t_i, at linear layers."""

    name = "teal"
    slot = "input"
    served = "channels"

    sparsity: float = option(0.4, "fraction of each site's input channels dropped on calibration text, in [0, 1)")
    score: Literal["input", "output"] = option(
        "input", "input: |x_i|, the paper's; output: |x_i| * norm of column i of W, at the same cost"
    )
    sites: str | tuple[str, ...] = option(
        "all", 'linear layers to change: "all" of the decoder layers, "all+head", or a list [q,k,v,o,gate,up,down,head]'
    )
    dense_prompt: bool = option(False, "compute the tokens of prompts with all channels")
    batch: Literal["own", "shared"] = option(
        "own",
        "decoding several sequences at once: own: each keeps its channels; shared: all use one list of that length",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise BadRecipe(
                f"teal: sparsity={self.sparsity} is outside [0, 1): it is the fraction of channels dropped."
            )
        check_sites(self.name, self.sites, ("all", "all+head"))

    def kinds(self, view: ModelView) -> Collection[str]:
        known = [*view.linear_kinds, "head"]
        if isinstance(self.sites, str):
            return known if self.sites == "all+head" else known[:-1]
        return pick_kinds(self.name, self.sites, known, view.config.model_type)

    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        linear = site.module
        weight_I = torch.ones(linear.in_features, device=linear.weight.device)
        if self.score == "output":
            weight_I = stored_of(linear).float().norm(dim=0)
        common, dropped, threshold_I = thresholds([x.abs() for x in seen.inputs], weight_I, self.sparsity)
        return {"threshold": common, "sparsity": dropped}, {"threshold": threshold_I}

    def build(self, site: Site, spec: Spec) -> SparseLinear:
        dense_prompt = self.dense_prompt and site.kind != "head"  # of which nothing is kept with the prompt
        return SparseLinear(site.module, dense_prompt=dense_prompt, batch=self.batch)
