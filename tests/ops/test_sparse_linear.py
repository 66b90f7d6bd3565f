"""The kernels of sandcat::sparse_linear against its reference."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_close
from written_out import both

from sandcat.ops import kernel_name
from sandcat.ops.checks import MAX_TOKENS

SHAPES = [(1, 1), (63, 1), (1, 63), (576, 1536), (4097, 65), (65, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

sparse_linear, reference = both("sparse_linear")

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(tokens, channels, outputs, dtype, device="cpu", *, sparsity=0.5, bias=False, seed=0):
    """Random inputs whose thresholds drop about `sparsity` of the channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator).to(dtype)
    weight = (torch.randn(channels, outputs, generator=generator) * channels**-0.5).to(dtype)
    level = x.float().abs().quantile(sparsity) * (0.5 + torch.rand(channels, generator=generator))
    bias = torch.randn(outputs, generator=generator) if bias else None
    return [None if t is None else t.to(device, dtype) for t in (x, weight, level, bias)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, outputs", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, MAX_TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference(dtype, channels, outputs, tokens, bias, device):
    args = arguments(tokens, channels, outputs, dtype, device, bias=bias)
    assert_close(sparse_linear(*args), reference(*args), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(device):
    args = arguments(1, 4097, 650, torch.bfloat16, device)
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        first, second = sparse_linear(*args), sparse_linear(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(first, reference(*args), torch.bfloat16)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [-1.0, float("inf")], ids=["all kept", "none kept"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_all_or_none(dtype, threshold, device, tokens):
    args = arguments(tokens, 128, 300, dtype, device)
    args[2] = torch.full_like(args[2], threshold)
    found = sparse_linear(*args)
    assert_close(found, reference(*args), dtype)
    assert bool((found == 0).all()) == (threshold > 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad):
    """It comes out as the reference has it, and the other tokens don't see it."""
    args = arguments(3, 64, 96, torch.float32)
    args[0][0, 7] = bad
    assert_close(sparse_linear(*args), reference(*args), torch.float32)


def test_rows_of_dropped_channels_are_not_read():
    args = arguments(1, 64, 96, torch.float32)
    want = reference(*args)
    dropped = args[0][0].abs() <= args[2]
    assert 0 < dropped.sum() < 64
    args[1][dropped] = float("nan")
    assert_close(sparse_linear(*args), want, torch.float32)


def test_not_contiguous():
    args = arguments(2, 64, 96, torch.float32, bias=True)
    strided = [torch.stack([t, t], -1)[..., 0] for t in args]
    strided[1] = args[1].t().contiguous().t()
    assert_close(sparse_linear(*strided), reference(*args), torch.float32)


def test_opcheck_and_one_graph():
    args = arguments(2, 64, 96, torch.float32, bias=True)
    sparse_linear.opcheck(*args)
    step = torch.compile(lambda x: sparse_linear(x * 2, *args[1:]) + 1, fullgraph=True)
    assert_close(step(args[0]), reference(args[0] * 2, *args[1:]) + 1, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    args = arguments(2, 65, 130, torch.float32, sparsity=0.95)
    try:
        torch.set_num_threads(threads)
        assert_close(sparse_linear(*args), reference(*args), torch.float32)
    finally:
        torch.set_num_threads(before)


def test_arguments_that_do_not_fit():
    good = arguments(2, 64, 96, torch.float32, bias=True)
    bad = {0: arguments(MAX_TOKENS + 1, 64, 96, torch.float32)[0], 2: good[2][:5], 3: good[3].bfloat16()}
    for place, tensor in bad.items():
        with pytest.raises(ValueError, match=rf"1 to {MAX_TOKENS} tokens|must be"):
            sparse_linear(*good[:place], tensor, *good[place + 1 :])


def test_a_kernel_runs_here():
    assert kernel_name("sparse_linear", "cpu") == "numba"
