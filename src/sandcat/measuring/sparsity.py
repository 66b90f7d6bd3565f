"""What is skipped at each site: asked for, calibrated, and realised on a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sandcat.layers.sparse_module import Thresholded, sparse_modules
from sandcat.plans.plan import Plan, layer_of, place_of


@dataclass(frozen=True)
class LayerSparsity:
    """Neurons dropped at one site: asked for, reached in calibration, and reached on the evaluation text."""

    site: str
    layer: int | None
    """None for the head."""
    target: float | None
    calibrated: float | None
    realised: float


@dataclass(frozen=True)
class Histogram:
    """How |a| is distributed at one site, in bins of equal width in log10: counts of kept and of dropped neurons."""

    site: str
    layer: int | None
    log10_edges: list[float]
    kept: list[int]
    dropped: list[int]
    threshold_low: float
    """10th, 50th and 90th percentile of the per-neuron thresholds (all one with score=activation)."""
    threshold: float
    threshold_high: float


def layer_sparsity(plan: Plan, realised: dict[str, float]) -> list[LayerSparsity]:
    """Target, calibration and reality of every site of the plan, in the order of layers."""
    rows = []
    for step in plan.steps:
        for site, spec in step.sites.items():
            if site not in realised:  # nothing is skipped there
                continue
            target = spec.get("target", None if plan.budget else step.method.options().get("sparsity"))
            rows.append(LayerSparsity(site, layer_of(site), target, spec.get("sparsity"), realised[site]))
    return sorted(rows, key=lambda row: place_of(row.site))


@torch.inference_mode()
def histograms(sparse: nn.Module, ids_NL: Tensor, sites: list[str], bins: int = 60) -> list[Histogram]:
    """The distribution of |a| at some sites over a few windows of text."""
    modules = sparse_modules(sparse)
    low, high = -4.0, 2.0
    found = {}
    for name in sites:
        found[name] = torch.zeros(2, bins, dtype=torch.long)

        def count(module: Thresholded, args: tuple, entry: Tensor = found[name]) -> None:
            a_TI = module.scores(args[0].flatten(0, -2))
            kept = ~(a_TI <= module.threshold)
            position = ((a_TI.float().log10() - low) / (high - low) * bins).nan_to_num(0, bins - 1, 0)
            index = position.long().clamp(0, bins - 1)
            for row, which in enumerate((kept, ~kept)):
                entry[row] += torch.bincount(index[which], minlength=bins).cpu()

        found[name] = (found[name], modules[name].register_forward_pre_hook(count))
    try:
        for ids_L in ids_NL:
            sparse(ids_L[None].to(sparse.device), use_cache=False, logits_to_keep=1)
    finally:
        for _, handle in found.values():
            handle.remove()
    edges = torch.linspace(low, high, bins + 1).tolist()
    rows = []
    for name, (counts, _) in found.items():
        t = modules[name].threshold.float().clamp(min=0).cpu()
        percentiles = t.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        rows.append(Histogram(name, layer_of(name), edges, counts[0].tolist(), counts[1].tolist(), *percentiles))
    return rows
