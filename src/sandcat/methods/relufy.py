"""ReLU in place of the model's activation, so that half of the neurons are exactly zero and can be skipped.

Paper: the baseline "ReLUfication" of CATS (Lee et al., 2024, arXiv 2404.08763), without its fine-tuning: it ruins a
pretrained model, and stands here to be compared with.
Differs: nothing; the zeros are really skipped (threshold 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.method import Method, Seen, Spec, Tensors
from sandcat.models.view import Site


@dataclass(frozen=True, kw_only=True)
class Relufy(Method):
    """MLP(x) = (relu(x Wg) * (x Wu)) Wd."""

    name = "relufy"
    slot = "input"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def decide(self, site: Site, seen: Seen) -> tuple[Spec, Tensors]:
        return {}, {}

    def build(self, site: Site, spec: Spec) -> SparseMLP:
        return SparseMLP(site, activation="relu")
