"""rsparse: the factors, what they cost, and how the share of each site is found."""

from __future__ import annotations

import pytest
import torch
from tiny import text, tiny

import sandcat
from sandcat.errors import BadRecipe, NothingMatched
from sandcat.layers.low_rank_linear import LowRankLinear
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring.bytes_read import bytes_share, read_bytes
from sandcat.method import Seen
from sandcat.methods import Rsparse
from sandcat.methods.rsparse import principal_directions
from sandcat.models.view import ModelView


@torch.no_grad()
def decide(method, x_TI):
    site = next(site for site in ModelView(tiny("llama")).sites() if site.kind == "up")
    return site, *method.decide(site, Seen(inputs=[x_TI]))


def inputs(tokens=512, rank=None):
    generator = torch.Generator().manual_seed(3)
    if rank is None:
        return torch.randn(tokens, 32, generator=generator)
    return torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, 32, generator=generator)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_bytes_are_those_of_the_budget(family):
    """Kept columns and both factors together, of every site, whatever the shape of its weight."""
    for alpha in ([1.0], [0.7]):
        model = tiny(family)
        plan = sandcat.sparsify(model, None, Rsparse(sparsity=0.4, alpha=alpha), calibration=text())
        dropped = {name: spec["sparsity"] for name, spec in plan.steps[0].sites.items()}
        for name, module in sparse_modules(model).items():
            assert isinstance(module, LowRankLinear) == (alpha == [0.7])
            small = module.threshold.nbytes + (0 if module.bias is None else module.bias.nbytes)
            read = (module.weight_bytes(1 - dropped[name]) - small) / module.weight.nbytes
            one_rank = sum(module.weight.shape) * 4 / module.weight.nbytes  # a rank is whole
            assert 0.6 - one_rank - 0.01 < read < 0.61
        weights = sum(module.weight.nbytes for module in sparse_modules(model).values())
        share = bytes_share(model, dropped)
        assert 1 - 0.4 * weights / read_bytes(model) - 0.05 < share < 1 - 0.3 * weights / read_bytes(model)


@torch.no_grad()
def test_the_factors_are_the_best_of_their_rank():
    """Against a singular value decomposition of what is dropped, and of the weight."""
    x_TI = inputs()
    for factors in ("output", "weight"):
        site, spec, found = decide(Rsparse(sparsity=0.3, alpha=[0.6], factors=factors), x_TI)
        weight, rank = site.module.weight, spec["rank"]
        assert rank == int(0.4 * 0.7 * 72 * 32 / (72 + 32)) and found["factor_a"].shape == (rank, 32)
        dropped = torch.where(x_TI.abs() <= found["threshold"], x_TI, 0)
        of_what = dropped @ weight.t() if factors == "output" else weight.t()
        s = torch.linalg.svdvals(of_what)
        best = s[rank:].square().sum()
        b = found["factor_b"]
        assert torch.allclose(found["factor_a"], b.t() @ weight, atol=1e-5)
        assert (of_what - of_what @ b @ b.t()).square().sum() <= 1.01 * best


@torch.no_grad()
def test_the_search_takes_the_share_with_the_smallest_error():
    """What has a low rank goes through the factors; what has none goes through the columns that are kept."""
    _, spread, _ = decide(Rsparse(sparsity=0.4), inputs())
    _, narrow, _ = decide(Rsparse(sparsity=0.4), inputs(rank=2))

    def error(alpha, x_TI):
        site, _, found = decide(Rsparse(sparsity=0.4, alpha=[alpha]), x_TI)
        lost = torch.where(x_TI.abs() <= found["threshold"], x_TI, 0)
        y = lost @ site.module.weight.t()
        if "factor_a" in found:
            y = y - lost @ found["factor_a"].t() @ found["factor_b"].t()
        return float(y.square().sum())

    for spec, x_TI in ((spread, inputs()), (narrow, inputs(rank=2))):
        errors = {alpha: error(alpha, x_TI) for alpha in (1.0, 0.95, 0.9, 0.8, 0.6)}
        best = min(errors, key=errors.get)
        assert spec["rank"] == int((1 - best) * 0.6 * 72 * 32 / (72 + 32))


def test_principal_directions():
    x = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 60)
    gram = x.t() @ x
    found, want = principal_directions(gram, 5), torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :5]
    assert torch.linalg.svdvals(found.t() @ want).min() > 0.999
    assert torch.allclose(found.t() @ found, torch.eye(5), atol=1e-5)
    assert principal_directions(gram, 0).shape == (60, 0)


def test_bad_input():
    for recipe in ("rsparse:sparsity=1", "rsparse:alpha=all", "rsparse:alpha=[0]", "rsparse:alpha=[1.5]"):
        with pytest.raises(BadRecipe, match="rsparse"):
            sandcat.sparsify(tiny("llama"), None, recipe, calibration=text())
    with pytest.raises(NothingMatched, match="rsparse: a phi3 model has no site 'q'"):
        sandcat.sparsify(tiny("phi3"), None, "rsparse:sites=[q]", calibration=text())
    with pytest.raises(BadRecipe, match="rsparse: sites"):
        sandcat.sparsify(tiny("llama"), None, "rsparse:sites=up", calibration=text())
