"""Runs the Triton kernels on the CPU by Triton's interpreter and compares them with the reference.

A program of its own, because the interpreter is chosen when the kernels are imported: `test_triton_interpreted.py` runs
it. It checks what the kernels compute, not what a GPU makes of them: the `gpu` tests do that.
"""

import contextlib
import itertools
import sys
from pathlib import Path

import interpreted  # noqa: F401  (before the kernels)
import torch

here = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (here, here.parent, here.parent.parent / "benchmarks")]

import teal_published
import test_codes
import test_shared
from conftest import assert_close
from test_sparse_mlp import arguments, expected
from written_out import both, of

import sandcat.ops.triton.shared_units as shared
import sandcat.ops.triton.sparse_linear as sparse_linear
import sandcat.ops.triton.sparse_linear_batch as several
import sandcat.ops.triton.sparse_mlp as sparse_mlp
import sandcat.ops.triton.sparse_mlp_batch as several_neurons
import sandcat.ops.triton.stored_linear as stored_linear
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.triton.primitives.arguments import three, three_sizes

reference_linear, reference_up_down = both("sparse_linear")[1], both("sparse_up_down")[1]
launch_linear = of(sparse_linear.launch, "sparse_linear")
launch_mlp = of(sparse_mlp.launch, "sparse_mlp")
launch_up_down = of(sparse_mlp.launch_up_down, "sparse_up_down")
launch_stored = of(stored_linear.launch, "stored_linear")
launch_shared = of(shared.launch, "shared_linear")
launch_shared_up_down = of(shared.launch_up_down, "shared_up_down")
empty = torch.empty


def poisoned(*shape, **options):
    tensor = empty(*shape, **options)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 127 if tensor.itemsize == 1 else 2**20)


torch.empty = poisoned
for module in (stored_linear, several, sparse_linear, sparse_mlp, several_neurons):
    module.multiprocessors = lambda device: 2
    module.dependent_launch = lambda device: {"PDL": False}
stored_linear.shared_memory = lambda device: 200000
torch.cuda.device = lambda device: contextlib.nullcontext()

count = 0


def check(found, want, dtype):
    global count
    assert_close(found, want, dtype)
    count += 1


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SIZES = (torch.float32, torch.float16)
for tokens, hidden, neurons, options in [
    (1, 1, 1, {}),
    (1, 63, 65, {}),
    (1, 1100, 33, {"bias": True, "activation": "gelu"}),
    (1, 64, 40, {"sparsity": 0.9, "activation": "gelu_tanh"}),
    (1, 64, 40, {"sparsity": 1.0, "activation": "relu"}),
    (2, 63, 65, {"bias": True}),
    (3, 1, 7, {}),
    (5, 300, 33, {"activation": "gelu_tanh"}),
    (8, 130, 40, {"sparsity": 0.9}),
]:
    for dtype in SIZES:
        args = arguments(tokens, hidden, neurons, dtype, "cpu", **options)
        check(launch_mlp(*args), expected(args), dtype)
    for bad in (float("nan"), float("inf")):
        args[0][0, 0] = bad
        check(launch_mlp(*args), expected(args), dtype)
args = arguments(2, 63, 65, torch.float32, "cpu", bias=True)
for rows in (1, 2):
    args[0] = args[0][:rows]
    strided = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in args]
    check(launch_mlp(*strided), expected(args), torch.float32)

for dtype, format in itertools.product(SIZES, ("int8", "fp8")):
    for channels, outputs in ((1, 1), (63, 65), (1100, 33)):
        args = test_codes.arguments(1, channels, outputs, dtype, format=format)
        for fixed in (contextlib.nullcontext, deterministic):
            with fixed():
                check(launch_stored(*args), test_codes.exact(*args), torch.float32)
        x, weight, scale, bias = args
        threshold = x.float().abs().quantile(0.5).expand(channels).to(dtype).contiguous()
        want = test_codes.exact(torch.where(x.abs() <= threshold, 0, x), weight, scale, bias)
        for fixed in (contextlib.nullcontext, deterministic):
            with fixed():
                check(launch_linear(x, weight.t(), threshold, bias, scale), want, torch.float32)
    for tokens in (1, 2):
        for fixed in (contextlib.nullcontext, deterministic):
            args = test_codes.mlp_arguments(tokens, 63, 130, dtype, format=format)
            with fixed():
                check(launch_mlp(*args), test_codes.exact_mlp(args), dtype)
            x, gate, up, down, threshold, activation, gate_bias, *biases, gate_scale, up_scale, down_scale = args
            a = ACTIVATIONS[activation](test_codes.exact(x, gate, gate_scale, gate_bias)).to(dtype)
            rest = (*biases, up_scale, down_scale)
            with fixed():
                found = launch_up_down(x, a, up, down, threshold, *rest)
            check(found, test_codes.exact_mlp(args), dtype)
            if format != "int8":
                continue
            x, gate, up, down, threshold, *_ = args = arguments(tokens, 300, 133, dtype, "cpu")
            a = ACTIVATIONS["silu"](torch.nn.functional.linear(x, gate))
            with fixed():
                check(launch_mlp(*args), expected(args), dtype)
                found = launch_up_down(x, a, up, down, threshold)
            check(found, reference_up_down(x, a, up, down, threshold), dtype)
    for tokens, channels, outputs in ((2, 1, 1), (3, 63, 65), (5, 300, 33), (16, 1100, 40)):
        args = test_codes.arguments(tokens, channels, outputs, dtype, format=format)
        for fixed in (contextlib.nullcontext, deterministic):
            with fixed():
                check(launch_stored(*args), test_codes.exact(*args), torch.float32)
        for options in ({}, {"bias": True}, {"format": "int8"}) if format == "int8" else ({"format": format},):
            x, weight, threshold, bias, scale = args = test_shared.linear(tokens, channels, outputs, dtype, **options)
            check(launch_linear(*args), reference_linear(*args), dtype)
            check(launch_shared(*args), test_shared.reference_linear(*args), dtype)
            args = test_shared.up_down(tokens, channels, outputs, dtype, **options)
            check(launch_up_down(*args), reference_up_down(*args), dtype)
            check(launch_shared_up_down(*args), test_shared.reference_up_down(*args), dtype)
for which, format in itertools.product(range(3), ("int8", "fp8")):  # one matrix alone as codes
    args = test_codes.mlp_arguments(1, 63, 130, torch.float32, format=format)
    want = test_codes.exact_mlp(args)
    for other in {0, 1, 2} - {which}:
        scale, args[9 + other] = args[9 + other], None
        args[1 + other] = args[1 + other].float() * (scale if other == 2 else scale[:, None])
    check(launch_mlp(*args), want, torch.float32)
for dtype, sizes in ((torch.float32, [33]), (torch.float16, [40, 24, 24])):  # TEAL's published way, a baseline
    weights = [torch.randn(70, size).to(dtype) for size in sizes]
    x, thresholds = torch.randn(70).to(dtype), [torch.rand(70).to(dtype) for _ in sizes]
    y = torch.zeros(sum(sizes), dtype=dtype)
    teal_published.masked_rows[(sum(-(-size // 16) for size in sizes), 3)](
        x, three(weights), three(thresholds), y, three_sizes(sizes), 70, CHANNELS=32, BLOCK=16
    )
    pairs = zip(weights, thresholds, strict=True)
    check(y, torch.cat([reference_linear(x[None], w, t)[0] for w, t in pairs]), dtype)
print(f"{count} cases equal the reference")
