"""The exact quantile against a sort."""

from __future__ import annotations

import pytest
import torch

from sandcat.errors import DataError
from sandcat.quantile import LARGEST, quantile, thresholds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("q", [0.001, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_sorting_gives_it(dtype, q, weighted):
    torch.manual_seed(1)
    batches = [torch.randn(100 + i, 37).abs().to(dtype) for i in range(3)]
    weight = torch.rand(37) if weighted else torch.ones(37)
    t = quantile(batches, weight, q)
    scores = torch.cat([(b.float() * weight).flatten() for b in batches])
    assert t in scores
    candidates = scores.unique()
    shares = torch.stack([(scores <= c).float().mean() for c in candidates])
    assert abs(float((scores <= t).float().mean()) - q) == pytest.approx(float((shares - q).abs().min()), abs=1e-7)


def test_ties_drop_what_comes_nearest():
    """Nine equal values and one below: asked for half, dropping one value in ten is nearer than dropping all."""
    a = torch.tensor([[0.5] + [1.0] * 9])
    assert quantile([a], torch.ones(10), 0.5) == 0.5
    assert quantile([a], torch.ones(10), 0.9) == 1.0
    assert quantile([torch.ones(1, 10)], torch.ones(10), 0.2) == -1.0  # nothing rather than everything


def test_infinities_are_an_error():
    with pytest.raises(DataError, match="overflows"):
        quantile([torch.tensor([[1.0, float("inf")]])], torch.ones(2), 0.5)


@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_thresholds_are_numbers_in_every_dtype(dtype, sparsity):
    """A unit that counts for nothing, or next to nothing, is dropped whatever it gives; at sparsity 0 none is."""
    weight = torch.tensor([1.0, 1e-7, 0, 1, 1])
    scores = torch.rand(50, 5).to(dtype)
    for columns, dead in ((scores, slice(1, 3)), (torch.where(torch.arange(5) < 3, scores, 0), 2)):  # common one: 0
        _, share, threshold = thresholds([columns], weight, sparsity)
        assert threshold.dtype == dtype and threshold.abs().max() <= LARGEST
        for other in (torch.bfloat16, torch.float16):
            assert threshold.to(other).to(torch.float16).isfinite().all()
        dropped = columns <= threshold
        assert share == pytest.approx(float(dropped.float().mean()))
        assert bool(dropped[:, dead].all()) == (sparsity > 0)
