"""Weights as codes: the kernels of `stored_linear`, and of the sparse ops with scales, against references and exact
sums."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_close, relative_error
from written_out import both

from sandcat.ops import kernel_name
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.checks import MAX_TOKENS
from sandcat.ops.weights import FORMATS

SHAPES = [(1, 1), (63, 1), (1, 63), (576, 1536), (4097, 65), (65, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

CODED = ["int8", "fp8"]
stored_linear, reference = both("stored_linear")
sparse_linear, sparse_mlp, sparse_up_down = (both(f"sparse_{op}")[0] for op in ("linear", "mlp", "up_down"))

pytestmark = pytest.mark.usefixtures("poisoned")


def codes(rows, columns, generator, format="int8"):
    """Every code but int8's -128, which a symmetric scale does not use, and e4m3's NaN."""
    if format == "int8":
        return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    bits = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
    sign = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8)
    return (bits + 128 * sign).view(torch.float8_e4m3fn)


def arguments(tokens, channels, outputs, dtype, *, bias=True, seed=0, format="int8"):
    """x, weight, scale, bias; scales differ a hundredfold, so that one at the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator).to(dtype)
    scale = 10 ** (2 * torch.rand(outputs, generator=generator)) * 1e-4 * channels**-0.5
    made = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    return [x, codes(outputs, channels, generator, format), scale.to(dtype), made]


def by_rows(codes):
    """The same, contiguous; PyTorch copies no floats of one byte."""
    return codes.view(torch.int8).contiguous().view(codes.dtype)


def exact(x, weight, scale, bias=None):
    """In float64, written out."""
    y = (x.double() @ weight.double().t()) * scale.double()
    return y if bias is None else y + bias.double()


def on(device, *args):
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, outputs", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, MAX_TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", CODED)
def test_stored_linear(device, dtype, channels, outputs, tokens, bias, format):
    args = arguments(tokens, channels, outputs, dtype, bias=bias, format=format)
    found = stored_linear(*on(device, *args))
    assert found.dtype == torch.float32
    assert_close(found, exact(*args), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels, outputs", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("format", CODED)
def test_sparse_linear(device, dtype, channels, outputs, tokens, format):
    x, weight, scale, bias = arguments(tokens, channels, outputs, dtype, format=format)
    threshold = x.float().abs().quantile(0.5).expand(channels).to(dtype).contiguous()
    want = exact(torch.where(x.abs() <= threshold, 0, x), weight, scale, bias)
    found = sparse_linear(*on(device, x, by_rows(weight.t()), threshold, bias, scale))
    if (device, dtype, format, tokens) == ("cuda", torch.bfloat16, "fp8", 1):  # sums of four products are float16
        assert relative_error(found, want) <= 2**-12
    else:
        assert_close(found, want, torch.float32)


def mlp_arguments(tokens, hidden, neurons, dtype, activation="silu", seed=0, format="int8"):
    """Those of sparse_mlp, all three matrices as codes, and all biases."""
    x, gate, gate_scale, gate_bias = arguments(tokens, hidden, neurons, dtype, seed=seed, format=format)
    _, up, up_scale, up_bias = arguments(1, hidden, neurons, dtype, seed=seed + 1, format=format)
    _, down, down_scale, down_bias = arguments(1, neurons, hidden, dtype, seed=seed + 2, format=format)
    gate_scale, up_scale = gate_scale * 30, up_scale * 30
    a = ACTIVATIONS[activation](exact(x, gate, gate_scale, gate_bias).to(dtype))
    threshold = a.float().abs().quantile(0.5).expand(neurons).to(dtype).contiguous()
    near = (a.float().abs() - threshold.float()).abs() <= 0.02 * threshold.float()  # where roundings decide: keep
    threshold[near.any(0)] = -1
    biases, scales = (gate_bias, up_bias, down_bias), (gate_scale, up_scale, down_scale)
    return [x, gate, up, by_rows(down.t()), threshold, activation, *biases, *scales]


def exact_mlp(args):
    x, gate, up, down, threshold, activation, gate_bias, up_bias, down_bias, *scales = args
    a = ACTIVATIONS[activation](exact(x, gate, scales[0], gate_bias))
    h = torch.where(a.abs() <= threshold, 0, a * exact(x, up, scales[1], up_bias))
    return exact(h, down.t(), scales[2], down_bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden, neurons", [(1, 1), (63, 65), (64, 1), (576, 1536)])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("format", CODED)
def test_sparse_mlp(device, dtype, hidden, neurons, tokens, activation, format):
    args = mlp_arguments(tokens, hidden, neurons, dtype, activation, format=format)
    assert_close(sparse_mlp(*on(device, *args)), exact_mlp(args), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("format", CODED)
def test_sparse_up_down(device, dtype, tokens, format):
    args = mlp_arguments(tokens, 63, 130, dtype, format=format)
    x, gate, up, down, threshold, activation, gate_bias, *biases, gate_scale, up_scale, down_scale = args
    a = ACTIVATIONS[activation](exact(x, gate, gate_scale, gate_bias)).to(dtype)
    found = sparse_up_down(*on(device, x, a, up, down, threshold, *biases, up_scale, down_scale))
    assert_close(found, exact_mlp(args), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("which", range(3), ids=["gate", "up", "down"])
@pytest.mark.parametrize("format", CODED)
def test_one_matrix_alone_as_codes(device, tokens, which, format):
    """Each of the three has its own storage."""
    args = mlp_arguments(tokens, 63, 130, torch.float32, format=format)
    want = exact_mlp(args)
    for other in {0, 1, 2} - {which}:
        scale = args[9 + other]
        args[1 + other] = args[1 + other].float() * (scale if other == 2 else scale[:, None])
        args[9 + other] = None
    assert_close(sparse_mlp(*on(device, *args)), want, torch.float32)


@pytest.mark.parametrize("format", CODED)
def test_sums_beyond_float16(format):
    """Sums of codes pass 65504 long before the outputs do."""
    x, row = torch.full((1, 576), 40.0, dtype=torch.float16), FORMATS[format]
    weight, scale = torch.full((3, 576), row.largest).to(row.codes), torch.full((3,), 1e-3, dtype=torch.float16)
    for op in (stored_linear, reference):
        assert_close(op(x, weight, scale), exact(x, weight, scale), torch.float16)


@pytest.mark.parametrize("format", CODED)
def test_not_finite(format):
    """It comes out where the definition has it, and the other tokens don't see it."""
    args = arguments(3, 64, 96, torch.float32, format=format)
    for bad in (float("nan"), float("inf")):
        args[0][0, 7] = bad
        args[1][:, 7] = torch.ones(()).to(args[1].dtype)
        assert_close(stored_linear(*args), exact(*args), torch.float32)


@pytest.mark.parametrize("format", CODED)
def test_not_contiguous(format):
    args = arguments(2, 64, 96, torch.float32, format=format)
    strided = [torch.cat([t[..., None], t[..., None]], -1)[..., 0] for t in args]
    assert not any(t.is_contiguous() for t in strided)
    assert_close(stored_linear(*strided), exact(*args), torch.float32)


@pytest.mark.parametrize("format", CODED)
def test_opcheck_and_one_graph(format):
    args = arguments(2, 64, 96, torch.float32, format=format)
    utils = ("test_schema", "test_faketensor") if format == "int8" else ("test_faketensor",)  # it compares no fp8
    stored_linear.opcheck(*args, test_utils=utils)
    step = torch.compile(lambda x: stored_linear(x * 2, *args[1:]) + 1, fullgraph=True)
    assert_close(step(args[0]), exact(args[0] * 2, *args[1:]) + 1, torch.float32)
    mlp = mlp_arguments(2, 64, 96, torch.float32, format=format)
    sparse_mlp.opcheck(*mlp, test_utils=utils)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    args = arguments(1, 65, 11, torch.float32)
    try:
        torch.set_num_threads(threads)
        assert_close(stored_linear(*args), exact(*args), torch.float32)
    finally:
        torch.set_num_threads(before)


def test_arguments_that_do_not_fit():
    good = arguments(2, 64, 96, torch.float32)
    bad = {0: arguments(MAX_TOKENS + 1, 64, 96, torch.float32)[0], 1: good[1].float(), 2: good[2][:, None]}
    bad |= {3: good[3].bfloat16()}
    for place, tensor in bad.items():
        with pytest.raises(ValueError, match=rf"1 to {MAX_TOKENS} tokens|must be|must have"):
            stored_linear(*good[:place], tensor, *good[place + 1 :])
    x, weight, _, bias = good
    with pytest.raises(ValueError, match="stored as int8, so it must have scales"):
        sparse_linear(x, weight.t(), torch.zeros(64), bias)  # int8 without its scales


def test_kernels_run_here():
    ops = ("stored_linear", "sparse_linear", "sparse_mlp")
    assert {kernel_name(op, "cpu", format) for op in ops for format in CODED} == {"numba"}
    assert kernel_name("stored_linear", "cpu") == "reference"  # that is PyTorch's product


@pytest.mark.gpu
def test_kernels_run_on_the_gpu():
    ops = ("stored_linear", "sparse_linear", "sparse_mlp", "sparse_up_down")
    assert {kernel_name(op, "cuda", format) for op in ops for format in CODED} == {"triton"}
