"""Masks by kernels are those of the definitions, bit for bit; bounds of a gate keep what its activation keeps."""

from __future__ import annotations

import pytest
import torch

from sandcat.ops import drop_up, mask
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.masks import gate_bounds, masked, without_dropped

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
TOKENS = pytest.mark.parametrize("tokens", [0, 1, 3, 200])
SPECIAL = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0])


def same(found: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(found.nan_to_num(7.0), want.nan_to_num(7.0))


@DTYPES
@TOKENS
def test_mask(tokens, dtype):
    x, t = torch.randn(tokens, 257).to(dtype), torch.rand(257).to(dtype)
    x[:, : len(SPECIAL)], t[3:5], x[:, 20:40] = SPECIAL.to(dtype), 0, t[20:40]
    found = mask(x, t)
    assert same(found, masked(x, t)) and (tokens < 3 or 0 < (found == 0).sum() < found.numel())
    assert same(mask(x.t().contiguous().t(), t), found)


@DTYPES
@TOKENS
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_drop_up(activation, tokens, dtype):
    y, t = torch.randn(tokens, 2 * 257).to(dtype), (torch.rand(257) * 0.4).to(dtype)
    y[:, : len(SPECIAL)] = SPECIAL.to(dtype)
    bounds, want, found = gate_bounds(t, activation), y.clone(), y.clone()
    without_dropped(want, bounds)
    drop_up(found, bounds)
    assert same(found, want) and (tokens < 3 or not same(found, y))
    torch.compiler.reset()
    compiled = torch.compile(lambda y: drop_up(y, bounds), fullgraph=True, dynamic=True, backend="aot_eager")
    found = y.clone()
    compiled(found)
    assert same(found, want)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounds_of_a_gate(activation, dtype):
    t_I = torch.cat([torch.zeros(1), torch.rand(40) * 1e-3, torch.rand(160) * 0.4, torch.rand(40) * 4]).to(dtype)
    if dtype == torch.float32:
        g_T = torch.cat([torch.randn(20000) * 2, torch.randn(1000) * 50])
    else:
        g_T = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # all there are
        g_T = g_T[g_T.isfinite()]
    a_T = ACTIVATIONS[activation](g_T)
    if dtype == torch.float32:  # where rounding does not decide
        t_I = t_I[((a_T.abs()[:, None] - t_I).abs() > 1e-6).all(0)]
        assert len(t_I) > 20
    y = torch.cat([g_T[:, None].expand(-1, len(t_I)), torch.ones(len(g_T), len(t_I), dtype=dtype)], 1)
    drop_up(y, gate_bounds(t_I, activation))
    kept = a_T[:, None].abs() > t_I
    assert y[:, len(t_I) :].bool().equal(kept) and 0 < kept.sum() < kept.numel()


def test_arguments_that_do_not_go_together():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="sandcat::"):
        mask(x, torch.rand(7))
    with pytest.raises(ValueError, match="sandcat::"):
        drop_up(x, torch.zeros(3, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match="contiguous"):
        drop_up(torch.randn(8, 2).t(), torch.zeros(3, 4, dtype=torch.int32))
