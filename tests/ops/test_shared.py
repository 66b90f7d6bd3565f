"""The kernels of sandcat::shared_linear and sandcat::shared_up_down against their references, and what they share."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_close
from written_out import both

from sandcat.ops import kernel_name
from sandcat.ops.checks import MAX_TOKENS
from sandcat.ops.shared_units import GROUP, shared_units
from sandcat.rounding import quantised

SHAPES = [(1, 1), (63, 1), (1, 63), (576, 1536), (4097, 65), (65, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

shared_linear, reference_linear = both("shared_linear")
shared_up_down, reference_up_down = both("shared_up_down")

pytestmark = pytest.mark.usefixtures("poisoned")


def linear(sequences, channels, outputs, dtype, *, sparsity=0.5, bias=False, format="float", seed=0):
    """Random inputs whose thresholds drop about `sparsity` of the channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, channels, generator=generator).to(dtype)
    weight = (torch.randn(channels, outputs, generator=generator) * channels**-0.5).to(dtype)
    level = x.float().abs().quantile(sparsity) * (0.5 + torch.rand(channels, generator=generator))
    bias = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    codes, scale = (weight.t(), None) if format == "float" else quantised(weight.t(), format=format)
    return [x, codes.t().contiguous(), level.to(dtype), bias, None if scale is None else scale[:, 0]]


def up_down(sequences, hidden, neurons, dtype, *, sparsity=0.5, bias=False, format="float", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, a = (torch.randn(sequences, size, generator=generator).to(dtype) for size in (hidden, neurons))
    up, down = ((torch.randn(neurons, hidden, generator=generator) * hidden**-0.5).to(dtype) for _ in range(2))
    level = a.float().abs().quantile(sparsity) * (0.5 + torch.rand(neurons, generator=generator))
    biases = [torch.randn(size, generator=generator).to(dtype) if bias else None for size in (neurons, hidden)]
    scales = [None, None]
    if format != "float":
        (up, up_scale), (down, down_scale) = (quantised(weight, format=format) for weight in (up, down.t()))
        down, scales = down.t().contiguous(), [up_scale[:, 0], down_scale[:, 0]]
    return [x, a, up, down, level.to(dtype), *biases, *scales]


def on(device, args):
    return [None if t is None else t.to(device) for t in args]


OPS = {"linear": (linear, shared_linear, reference_linear), "up_down": (up_down, shared_up_down, reference_up_down)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 7, MAX_TOKENS])
@pytest.mark.parametrize("extra", [{}, {"bias": True}, {"format": "int8"}, {"format": "fp8"}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference(op, dtype, shape, sequences, extra, device):
    make, run, reference = OPS[op]
    args = make(sequences, *shape, dtype, **extra)
    assert_close(run(*on(device, args)), reference(*args), dtype)


def by_hand(scores, threshold):
    """The shared units by sorting lists."""
    sequences, found = len(scores), []
    for first in range(0, len(threshold), GROUP):
        group = range(first, min(first + GROUP, len(threshold)))
        kept = sum(not scores[b][u] <= threshold[u] for b in range(sequences) for u in group)
        score = {u: sum((scores[b][u] / max(threshold[u], 1e-15)) ** 2 for b in range(sequences)) for u in group}
        order = sorted(group, key=lambda u: (-score[u], u))  # used at once
        found += sorted(order[: round(kept / sequences)])  # which rounds halves to the even number
    return found


@pytest.mark.parametrize("sequences", range(1, MAX_TOKENS + 1))
def test_the_list_is_as_long_as_what_a_sequence_keeps(sequences):
    """And has what all of them together want most."""
    generator = torch.Generator().manual_seed(sequences)
    scores = torch.randn(sequences, 1001, generator=generator).abs()
    threshold = torch.rand(1001, generator=generator) + 0.2
    units = shared_units(scores, threshold)
    own = scores > threshold
    assert abs(int(units.sum()) - own.sum() / sequences) < 0.02 * len(threshold)
    assert units.nonzero().flatten().tolist() == by_hand(scores.double().tolist(), threshold.double().tolist())
    if sequences == 1:
        assert torch.equal(units, own[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sequences", [2, 5, MAX_TOKENS])
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_reads_only_the_list_and_all_sequences_use_it(op, sequences, device):
    """Rows outside it may hold anything; rows in it reach every sequence."""
    make, run, reference = OPS[op]
    args = make(sequences, 130, 66, torch.float32, sparsity=0.7)
    given, rows = (args[0], 1) if op == "linear" else (args[1], 2)
    units = shared_units(given.abs(), args[2] if op == "linear" else args[4])
    assert 0 < units.sum() < len(units)
    want = reference(*args)
    for place in range(rows, 2 * rows):
        args[place] = torch.where(units[:, None], args[place], torch.nan)
    assert_close(run(*on(device, args)), want, torch.float32)
    everywhere = torch.where(units, given, 0) @ torch.ones(len(units), 3) if op == "linear" else None
    if everywhere is not None:
        args[1] = units[:, None] * torch.ones(len(units), 3)
        assert_close(run(*on(device, args[:3])), everywhere, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_go_by_order(dtype, device):
    """In kernel and definition alike: else what a step gives would depend on what runs it."""
    args = linear(4, 64, 96, dtype)
    args[0] = torch.ones_like(args[0])
    args[2] = torch.where(torch.arange(64) % 2 == 0, 0.5, 2.0).to(dtype)
    args[0][:2, ::2] = 0.25  # two of four sequences keep every other channel: 16 of the 32 that score alike
    units = shared_units(args[0].abs(), args[2])  # of 8 that score alike in a group of 16, half
    assert units.nonzero().flatten().tolist() == [u for u in range(0, 64, 2) if u % GROUP < 8]
    assert_close(shared_linear(*on(device, args)), reference_linear(*args), dtype)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("inf")])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_thresholds_that_keep_all_or_none(op, dtype, threshold, device):
    make, run, reference = OPS[op]
    args = make(3, 64, 96, dtype)
    place = 2 if op == "linear" else 4
    args[place] = torch.full_like(args[place], threshold)
    found = run(*on(device, args))
    assert_close(found, reference(*args), dtype)
    assert bool((found == 0).all()) == (threshold > 0)


def test_zeros_are_dropped_first():
    scores = torch.tensor([[0.0, 3.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.1]])
    assert shared_units(scores, torch.zeros(4)).tolist() == [False, True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_not_finite(op, bad, device):
    """It comes out as the reference has it, and in no other sequence."""
    make, run, reference = OPS[op]
    args = make(5, 64, 96, torch.float32)
    args[1 if op == "up_down" else 0][0, 7] = bad
    found = run(*on(device, args))
    assert not found[0].isfinite().all() and found[1:].isfinite().all()
    assert_close(found, reference(*args), torch.float32)


def test_steps_at_once():
    """The reference chooses for each step by itself."""
    args = linear(3, 64, 96, torch.float32)
    x_BTI = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    found = reference_linear(x_BTI, *args[1:])
    for t in range(5):
        assert_close(found[:, t], shared_linear(x_BTI[:, t], *args[1:]), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_not_contiguous_opcheck_and_one_graph(op):
    make, run, reference = OPS[op]
    args = make(6, 64, 96, torch.float32, bias=True)
    strided = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in args]
    assert_close(run(*strided), reference(*args), torch.float32)
    run.opcheck(*args)
    step = torch.compile(lambda x: run(x * 2, *args[1:]) + 1, fullgraph=True)
    assert_close(step(args[0]), reference(args[0] * 2, *args[1:]) + 1, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads(op, threads):
    make, run, reference = OPS[op]
    before = torch.get_num_threads()
    args = make(9, 65, 130, torch.float32, sparsity=0.95)
    try:
        torch.set_num_threads(threads)
        assert_close(run(*args), reference(*args), torch.float32)
    finally:
        torch.set_num_threads(before)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=f"1 to {MAX_TOKENS} tokens"):
        shared_linear(*linear(MAX_TOKENS + 1, 64, 96, torch.float32))
    args = up_down(2, 64, 96, torch.float32)
    with pytest.raises(ValueError, match=r"shared_up_down: a: .* must be"):
        shared_up_down(args[0], args[1][:, :5], *args[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_fixed_order_on_a_gpu(op):
    """The reference runs, whose bits are the same each time."""
    make, run, reference = OPS[op]
    args = on("cuda", make(5, 1024, 512, torch.bfloat16))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(run(*args), reference(*args))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_kernels_run_on_the_gpu():
    ops = ("shared_linear", "shared_up_down")
    assert {kernel_name(op, "cuda", format) for op in ops for format in ("float", "int8", "fp8")} == {"triton"}


def test_a_kernel_runs_here():
    for op in ("shared_linear", "shared_up_down"):
        assert kernel_name(op, "cpu") == kernel_name(op, "cpu", "fp8") == "numba"
