"""Times many shapes of programs for the CUDA kernels of one token: what to write into `gate_config` and
`up_down_config`, and with int8 weights into `int8_rows_config`.

    python benchmarks/tune_mlp.py [--hidden 4096 --neurons 14336 --sparsity 0.5] [--int8]

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

import sandcat.ops.triton.int8_linear as int8_linear
import sandcat.ops.triton.sparse_mlp as kernels
from sandcat.measuring.speed import Timer, read_bandwidth
from sandcat.methods.int8 import quantised
from sandcat.ops.int8_linear import reference as dense_reference
from sandcat.ops.sparse_mlp import reference

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--hidden", type=int, default=4096)
parser.add_argument("--neurons", type=int, default=14336)
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--int8", action="store_true", help="weights in int8 instead of bfloat16")
parser.add_argument("--copies", type=int, default=12, help="of the weights")
parser.add_argument("--best", type=int, default=6, help="how many to print")
options = parser.parse_args()
H, I, device = options.hidden, options.neurons, torch.device("cuda")
torch.manual_seed(0)


def matrices() -> tuple[list[Tensor], list[Tensor | None]]:
    """gate, up and down as the op takes them, one row a neuron; and their scales."""
    dense = [(torch.randn(*shape, device=device) * H**-0.5).bfloat16() for shape in ((I, H), (I, H), (H, I))]
    made = [quantised(w) if options.int8 else (w, None) for w in dense]
    weights, scales = [w for w, _ in made], [None if s is None else s[:, 0] for _, s in made]
    return [weights[0], weights[1], weights[2].t().contiguous()], scales


layers = [matrices() for _ in range(options.copies)]
x = torch.randn(1, H, device=device).bfloat16()
gates = [w[0] if s[0] is None else (w[0] * s[0][:, None]).bfloat16() for w, s in layers]
activations = [F.silu(F.linear(x, gate)).float().abs() for gate in gates]
thresholds = [torch.full((I,), float(a.quantile(options.sparsity)), device=device).bfloat16() for a in activations]
for (weights, _), a, t in zip(layers, activations, thresholds, strict=True):
    weights[2][((a - t).abs() < 0.02 * t)[0]] = 0  # neurons near their threshold, which fall on either side
kept = sum(float((a > t).any(0).float().mean()) for a, t in zip(activations, thresholds, strict=True))
size = layers[0][0][0].element_size()


def mlp() -> list[Tensor]:
    return [
        kernels.launch(x, *weights, t, "silu", None, None, None, *scales)
        for (weights, scales), t in zip(layers, thresholds, strict=True)
    ]


def linear() -> list[Tensor]:
    return [int8_linear.launch(x, weights[0], scales[0]) for weights, scales in layers]


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
      f"{'int8' if options.int8 else 'bfloat16'}, read bandwidth {read_bandwidth(device) / 1e9:.0f} GB/s")  # fmt: skip
columns = triton.next_power_of_2(H)
weights, scales = layers[0]
want, read = reference(x, *weights, thresholds[0], "silu", None, None, None, *scales), options.copies + 2 * kept
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
if options.int8:
    sweep(
        int8_linear,
        "int8_rows_config",
        linear,
        dense_reference(x, weights[0], scales[0]),
        options.copies * I * H,
        [
            int8_linear.int8_rows_config([I], H, device, H, rows=rows, block=block, stages=stages, warps=warps)
            for rows, block, stages, warps in itertools.product((64, 128, 256), (128, 256), (2, 3, 4), (4, 8))
            if rows >= 16 * warps
        ],
    )
