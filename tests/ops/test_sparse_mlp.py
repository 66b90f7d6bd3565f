"""The kernels of sandcat::sparse_mlp against its reference."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_close
from written_out import both

from sandcat.ops import kernel_name
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.checks import MAX_TOKENS

SHAPES = [(1, 1), (63, 1), (1, 63), (576, 1536), (63, 4097), (4097, 65), (256, 100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

sparse_mlp, reference = both("sparse_mlp")
sparse_up_down, reference_up_down = both("sparse_up_down")

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(tokens, hidden, neurons, dtype, device, *, activation="silu", sparsity=0.5, bias=False, seed=0):
    """Random inputs whose thresholds drop about `sparsity` of the neurons."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x = random(tokens, hidden)
    gate, up, down = (random(neurons, hidden, scale=hidden**-0.5) for _ in range(3))
    biases = [random(neurons), random(neurons), random(hidden)] if bias else [None] * 3
    a = ACTIVATIONS[activation](
        torch.nn.functional.linear(x.float(), gate.float(), biases[0].float() if bias else None)
    )
    threshold = (a.abs().quantile(sparsity) * (0.5 + torch.rand(neurons, generator=generator))).to(dtype)
    args = [x, gate, up, down, threshold, activation, *biases]
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]


def expected(args):
    """The reference in the arguments' dtype on the CPU, whose sums are float32 or better."""
    return reference(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in args))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden, neurons", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, MAX_TOKENS])
def test_equals_reference(device, dtype, hidden, neurons, tokens):
    args = arguments(tokens, hidden, neurons, dtype, device)
    assert_close(sparse_mlp(*args), expected(args), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("tokens", [1, 3])
def test_activations_and_biases(device, dtype, activation, tokens):
    args = arguments(tokens, 96, 200, dtype, device, activation=activation, bias=True)
    assert_close(sparse_mlp(*args), expected(args), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [-1.0, float("inf")], ids=["all kept", "none kept"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_all_or_none(device, dtype, threshold, tokens):
    args = arguments(tokens, 128, 300, dtype, device)
    args[4] = torch.full_like(args[4], threshold)
    found = sparse_mlp(*args)
    assert_close(found, expected(args), dtype)
    assert bool((found == 0).all()) == (threshold > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(device, dtype, tokens, bad):
    """A NaN or infinity of one token comes out as the reference has it, and the other tokens don't see it."""
    args = arguments(tokens, 64, 96, dtype, device)
    args[0][0, 7] = bad
    assert_close(sparse_mlp(*args), expected(args), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_up_that_is_not_finite_in_a_dropped_neuron(device):
    """Even if the other token keeps the neuron, so that its row is read."""
    args = arguments(2, 64, 96, torch.float32, device)
    a = torch.nn.functional.silu(args[0] @ args[1].t()).abs()
    args[4] = a.amin(0) + (a.amax(0) - a.amin(0)) / 2  # each neuron kept by exactly one of the two
    args[2][:, 0] = float("inf")
    assert_close(sparse_mlp(*args), expected(args), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_not_contiguous(device, tokens):
    args = arguments(tokens, 64, 96, torch.float32, device, bias=True)
    strided = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in args]
    strided[3] = args[3].t().contiguous().t()
    assert not any(t.is_contiguous() for t in strided if isinstance(t, torch.Tensor))
    assert_close(sparse_mlp(*strided), expected(args), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_dropped_neurons_are_not_used(device):
    """With NaN in every row that no token keeps, nothing of it comes out: they are really skipped."""
    args = arguments(1, 64, 96, torch.float32, device)
    want = expected(args)
    dropped = torch.nn.functional.silu(args[0] @ args[1].t())[0].abs() <= args[4]
    assert 0 < dropped.sum() < 96
    args[2][dropped], args[3][dropped] = float("nan"), float("nan")
    assert_close(sparse_mlp(*args), want, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_random_inputs_again_and_again(device):
    """Fresh inputs each time: nothing is left over from the call before."""
    for seed in range(20):
        args = arguments(1 + seed % MAX_TOKENS, 65, 130, torch.float32, device, seed=seed, sparsity=seed / 20)
        assert_close(sparse_mlp(*args), expected(args), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    for tokens in (1, 3):
        args = arguments(tokens, 64, 96, torch.float32, device, bias=True)
        sparse_mlp.opcheck(*args)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_in_one_graph(device):
    args = arguments(1, 64, 96, torch.float32, device)
    step = torch.compile(lambda x: sparse_mlp(x * 2, *args[1:]) + 1, fullgraph=True)
    want = expected([args[0] * 2, *args[1:]]) + 1
    assert_close(step(args[0]), want, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("neurons", [3, 130])
def test_any_number_of_threads(threads, neurons):
    """More threads than cores, and than neurons; several Python threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    before = torch.get_num_threads()
    args = arguments(2, 65, neurons, torch.float32, "cpu")
    want = expected(args)
    try:
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(lambda _: sparse_mlp(*args), range(12)):
                assert_close(found, want, torch.float32)
    finally:
        torch.set_num_threads(before)


def test_without_openmp(monkeypatch):
    """The other pool, Numba's own, gives the same, also from several Python threads."""
    from concurrent.futures import ThreadPoolExecutor

    from sandcat.ops.numba import sparse_mlp as kernel
    from sandcat.ops.numba.primitives import threads

    monkeypatch.setattr(threads, "_openmp", None)
    kernel._kernel.cache_clear()
    args = arguments(2, 65, 130, torch.float32, "cpu")
    try:
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(lambda _: sparse_mlp(*args), range(6)):
                assert_close(found, expected(args), torch.float32)
    finally:
        kernel._kernel.cache_clear()


def test_arguments_that_do_not_fit():
    good = arguments(2, 64, 96, torch.float32, "cpu", bias=True)
    bad = {0: arguments(MAX_TOKENS + 1, 64, 96, torch.float32, "cpu")[0], 2: good[2][:90], 3: good[3][:, :60]}
    bad |= {4: good[4].bfloat16(), 6: good[6][:5], 7: good[7].double(), 8: good[8][:5]}
    for place, tensor in bad.items():
        args = [*good[:place], tensor, *good[place + 1 :]]
        with pytest.raises(ValueError, match=rf"1 to {MAX_TOKENS} tokens|must be"):
            sparse_mlp(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_cuda_graph(tokens):
    args = arguments(tokens, 576, 1536, torch.bfloat16, "cuda")
    sparse_mlp(*args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sparse_mlp(*args)
    for seed in (1, 2):
        args[0].copy_(arguments(tokens, 576, 1536, torch.bfloat16, "cuda", seed=seed)[0])
        graph.replay()
        assert_close(found, expected(args), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_two_runs_give_the_same_bits(monkeypatch, tokens):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = arguments(tokens, 4096, 14337, torch.bfloat16, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first = sparse_mlp(*args)
        assert_close(first, expected(args), torch.bfloat16)
        assert all(torch.equal(sparse_mlp(*args), first) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_kernel_runs_here():
    assert kernel_name("sparse_mlp", "cpu") == "numba"


@pytest.mark.gpu
def test_a_kernel_runs_on_the_gpu():
    assert kernel_name("sparse_mlp", "cuda") == "triton"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden, neurons", SHAPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_up_down_equals_its_reference(device, dtype, hidden, neurons, tokens):
    """The second half alone, for a gate that was computed elsewhere."""
    x, gate, up, down, threshold, activation, gate_bias, *biases = arguments(
        tokens, hidden, neurons, dtype, "cpu", bias=True
    )
    a = ACTIVATIONS[activation](torch.nn.functional.linear(x, gate, gate_bias))
    args = tuple(t.to(device) for t in (x, a, up, down, threshold, *biases))
    assert_close(sparse_up_down(*args), reference_up_down(x, a, up, down, threshold, *biases), dtype)
    sparse_up_down.opcheck(*args, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="must be"):
        sparse_up_down(args[0], args[1][:, :-1] if neurons > 1 else args[1].double(), *args[2:])
