"""Contextually aware thresholding: a neuron whose gate is small for this token is not computed.

Paper: CATS, Lee et al., 2024, arXiv 2404.08763. With a = act(x Wg), neuron j of a token is kept iff |a_j| > t, where t
is the s-quantile of |a| in this layer over calibration text. The gate stays dense; a dropped neuron's rows of Wu and
Wd are never read.
Differs: exact quantiles (theirs are the left edges of bins 0.002 wide); padding and the first positions excluded; each
layer is calibrated on what the sparse layers before it give (theirs: all dense); and scores that weight a neuron, at no
cost a token: `value`, the channel-wise thresholds of CHESS (arXiv 2409.01366), by the u = x Wu that it is multiplied
with; `output`, after the CETT of "Sparsing Law" (arXiv 2411.02335), by what it adds to the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sandcat.errors import BadRecipe
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.weights import stored_of
from sandcat.method import Method, Seen, Spec, Tensors
from sandcat.models.view import Site
from sandcat.ops.weights import product
from sandcat.quantile import thresholds
from sandcat.support.options import option
from sandcat.support.processes import everyones, total


@dataclass(frozen=True, kw_only=True)
class Cats(Method):
    """MLP(x) = (a * (x Wu)) Wd over the neurons with |a_j| > t_j, a = act(x Wg)."""

    name = "cats"
    slot = "input"
    served = "neurons"

    sparsity: float = option(0.5, "fraction of each layer's neurons dropped on calibration text, in [0, 1)")
    score: Literal["activation", "value", "output"] = option(
        "activation",
        "activation: |a_j|, the paper's; value: |a_j| * sqrt(E[u_j^2]), CHESS's; output: that times the norm of row j "
        "of Wd; all at one cost",
    )
    dense_prompt: bool = option(False, "compute the tokens of prompts with all neurons")
    batch: Literal["own", "shared"] = option(
        "own",
        "decoding several sequences at once: own: each keeps its neurons; shared: all use one list of that length",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise BadRecipe(f"cats: sparsity={self.sparsity} is outside [0, 1): it is the fraction of neurons dropped.")

    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        mlp = SparseMLP(site)
        weight_I = torch.ones_like(mlp.threshold, dtype=torch.float32)
        if self.score != "activation":
            square_I = total(lambda x: product(x, mlp.up()).float().square().sum(0), seen.inputs)
            weight_I = (square_I / sum(everyones(sum(len(x) for x in seen.inputs)))).sqrt()
        if self.score == "output":
            weight_I = weight_I * stored_of(mlp.down).float().norm(dim=0)
        common, dropped, threshold_I = thresholds([mlp.scores(x) for x in seen.inputs], weight_I, self.sparsity)
        return {"threshold": common, "sparsity": dropped}, {"threshold": threshold_I}

    def build(self, site: Site, spec: Spec) -> SparseMLP:
        return SparseMLP(site, dense_prompt=self.dense_prompt, batch=self.batch)
