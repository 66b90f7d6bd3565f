"""Times many shapes of programs for the CUDA kernels of one token: what to write into
`gate_config` and `up_down_config`.

    python benchmarks/tune_mlp.py [--hidden 4096 --neurons 14336 --sparsity 0.5]

Prints the fastest with the microseconds of the whole op. Weights rotate past the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
import triton

import sandcat.ops.triton.sparse_mlp as kernels
from sandcat.benchmark import Timer, read_bandwidth
from sandcat.ops.sparse_mlp import reference

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--hidden", type=int, default=4096)
parser.add_argument("--neurons", type=int, default=14336)
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--copies", type=int, default=6)
parser.add_argument("--best", type=int, default=6)
options = parser.parse_args()
H, I, device = options.hidden, options.neurons, torch.device("cuda")
torch.manual_seed(0)
layers = [
    [(torch.randn(I, H, device=device) * H**-0.5).to(torch.bfloat16) for _ in range(3)] for _ in range(options.copies)
]
x = torch.randn(1, H, device=device).to(torch.bfloat16)
activations = [F.silu(F.linear(x, gate)).float().abs() for gate, *_ in layers]
thresholds = [torch.full((I,), float(a.quantile(options.sparsity)), device=device).bfloat16() for a in activations]
read = (
    sum(1 + 2 * float((a > t).any(0).float().mean()) for a, t in zip(activations, thresholds, strict=True)) * I * H * 2
)


def run():
    return [kernels.launch(x, *layer, t, "silu") for layer, t in zip(layers, thresholds, strict=True)]


def sweep(name: str, configs: list[dict]) -> dict:
    """The fastest configuration of those that compile and are right; prints the best."""
    variants, chosen = {}, {}
    want = reference(x, *layers[0], thresholds[0], "silu")
    for config in configs:

        def of(config=config):
            setattr(kernels, name, lambda *args: dict(config))
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
            f"{name:14} {times[config] / options.copies * 1e6:7.1f} us {read / times[config] / 1e9:6.0f} GB/s  {config}"
        )
    setattr(kernels, name, lambda *args: dict(chosen[ranked[0]]))
    return chosen[ranked[0]]


print(f"{torch.cuda.get_device_name()}, MLP {H} x {I}, sparsity {options.sparsity}, bfloat16, "
      f"read bandwidth {read_bandwidth(device) / 1e9:.0f} GB/s")  # fmt: skip
columns = triton.next_power_of_2(H)
sweep(
    "up_down_config",
    [
        {"NEURONS": neurons, "BLOCK": columns, "num_warps": warps, "per_multiprocessor": programs}
        for neurons, warps, programs in itertools.product((1, 2, 4, 8), (4, 8, 16), (1, 2, 3))
        if 8 <= neurons * columns // (32 * warps) <= 64 and warps * programs <= 64
    ],
)
sweep(
    "gate_config",
    [
        {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        for rows, block, warps in itertools.product((2, 4, 8, 16, 32), (128, 256, 512, 1024, 2048), (2, 4, 8))
        if 16 <= rows * block // (32 * warps) <= 64
    ],
)
