"""Times many shapes of programs for the CUDA kernels of one token: what to write into `gate_config` and
`up_down_config`, and with weights as codes into `coded_rows_config`.

    python benchmarks/tune_mlp.py [--hidden 4096 --neurons 14336 --sparsity 0.5] [--format int8]

Prints the fastest with the microseconds of the whole op. Weights rotate past the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from copy import copy
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import sandcat.ops.triton.sparse_mlp as kernels
import sandcat.ops.triton.stored_linear as stored_linear
from sandcat.measuring.speed import Timer, read_bandwidth
from sandcat.ops.sparse_mlp import reference
from sandcat.ops.stored_linear import reference as dense_reference
from sandcat.ops.weights import Stored
from sandcat.rounding import quantised

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--hidden", type=int, default=4096)
parser.add_argument("--neurons", type=int, default=14336)
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--format", default="float", help="how weights are stored: float (bfloat16), int8, fp8")
parser.add_argument("--copies", type=int, default=12, help="of the weights")
parser.add_argument("--best", type=int, default=6, help="how many to print")
options = parser.parse_args()
H, I, device = options.hidden, options.neurons, torch.device("cuda")
torch.manual_seed(0)


def matrices() -> list[Stored]:
    """gate, up and down as the op takes them."""
    dense = [(torch.randn(*shape, device=device) * H**-0.5).bfloat16() for shape in ((I, H), (I, H), (H, I))]
    if options.format == "float":
        gate, up, down = map(Stored, dense)
    else:
        made = (quantised(weight, format=options.format) for weight in dense)
        gate, up, down = (Stored(codes, scale[:, 0], format=options.format) for codes, scale in made)
    bits = down.codes if down.scale is None else down.codes.view(torch.int8)
    return [gate, up, down._replace(codes=bits.t().contiguous().t().view(down.codes.dtype))]


layers = [matrices() for _ in range(options.copies)]
x = torch.randn(1, H, device=device).bfloat16()
gates = [gate.float().bfloat16() for gate, *_ in layers]
activations = [F.silu(F.linear(x, gate)).float().abs() for gate in gates]
thresholds = [torch.full((I,), float(a.quantile(options.sparsity)), device=device).bfloat16() for a in activations]
for (*_, down), a, t in zip(layers, activations, thresholds, strict=True):
    down.codes.t()[((a - t).abs() < 0.02 * t)[0]] = torch.zeros((), device=device).to(
        down.codes.dtype
    )  # neurons near their threshold, which fall on either side
kept = sum(float((a > t).any(0).float().mean()) for a, t in zip(activations, thresholds, strict=True))
size = layers[0][0].codes.element_size()


def mlp() -> list[Tensor]:
    return [kernels.launch(x, *weights, t, "silu") for weights, t in zip(layers, thresholds, strict=True)]


def linear() -> list[Tensor]:
    return [stored_linear.launch(x, gate) for gate, *_ in layers]


def sweep(module: ModuleType, name: str, run: Callable, want: Tensor, read: float, configs: list[dict]) -> None:
    """Tries configurations of a kernel, prints the fastest that compile and are right, and leaves the best in place."""
    variants, chosen = {}, {}
    for config in configs:

        def of(config=config):
            setattr(module, name, lambda *args: copy(config))
            return run()

        try:
            found = of()[0]
        except triton.runtime.errors.OutOfResources:
            continue
        if not (found - want).norm() < 1e-2 * want.norm():
            raise SystemExit(f"{name} {config}: the result is wrong")
        variants[str(config)], chosen[str(config)] = of, config
    times = Timer(variants, device).medians(9)
    ranked = sorted(times, key=times.__getitem__)
    for config in ranked[: options.best]:
        print(
            f"{name:17} {times[config] / options.copies * 1e6:7.1f} us {read / times[config] / 1e9:6.0f} GB/s  {config}"
        )
    setattr(module, name, lambda *args: copy(chosen[ranked[0]]))


print(f"{torch.cuda.get_device_name()}, MLP {H} x {I}, sparsity {options.sparsity}, "
      f"{options.format}, read bandwidth {read_bandwidth(device) / 1e9:.0f} GB/s")  # fmt: skip
columns = triton.next_power_of_2(H)
want, read = reference(x, *layers[0], thresholds[0], "silu"), options.copies + 2 * kept
sweep(
    kernels,
    "up_down_config",
    mlp,
    want,
    read * I * H * size,
    [
        {"NEURONS": neurons, "BLOCK": columns, "num_warps": warps, "per_multiprocessor": programs}
        for neurons, warps, programs in itertools.product((1, 2, 4, 8), (4, 8, 16), (1, 2, 3))
        if 8 <= neurons * columns // (32 * warps) <= 64 and warps * programs <= 64
    ],
)
sweep(
    kernels,
    "gate_config",
    mlp,
    want,
    read * I * H * size,
    [
        {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        for rows, block, warps in itertools.product((2, 4, 8, 16, 32), (128, 256, 512, 1024, 2048), (2, 4, 8))
        if 16 <= rows * block // (32 * warps) <= 64
    ],
)
if options.format != "float":
    sweep(
        stored_linear,
        "coded_rows_config",
        linear,
        dense_reference(x, layers[0][0]),
        options.copies * I * H,
        [
            stored_linear.coded_rows_config(
                options.format, [I], H, device, H, rows=rows, block=block, stages=stages, warps=warps
            )
            for rows, block, stages, warps in itertools.product((64, 128, 256), (128, 256), (2, 3, 4), (4, 8))
            if rows >= 16 * warps
        ],
    )
