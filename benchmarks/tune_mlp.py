"""Times many shapes of programs for the one-token CUDA kernels, to choose `gate_config` and `up_down_config`.

    python benchmarks/tune_mlp.py [--hidden 4096 --neurons 14336 --sparsity 0.5]

Prints the fastest of each kernel with the bandwidth it reads at. Weights rotate past the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
import triton

import sandcat.ops.triton.sparse_mlp as kernels
from sandcat.benchmark import Timer, read_bandwidth

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--hidden", type=int, default=4096)
parser.add_argument("--neurons", type=int, default=14336)
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--copies", type=int, default=6)
parser.add_argument("--best", type=int, default=8)
options = parser.parse_args()
H, I, device = options.hidden, options.neurons, torch.device("cuda")
torch.manual_seed(0)
layers = [
    [(torch.randn(I, H, device=device) * H**-0.5).to(torch.bfloat16) for _ in range(3)] for _ in range(options.copies)
]
x = torch.randn(1, H, device=device).to(torch.bfloat16)
activations = [F.silu(F.linear(x, gate))[0] for gate, *_ in layers]
thresholds = [torch.full_like(a, float(a.float().abs().quantile(options.sparsity))) for a in activations]
y, count = torch.zeros(H, device=device), torch.zeros(1, dtype=torch.int32, device=device)
rows_n, a_n = torch.empty(I, dtype=torch.int32, device=device), torch.empty(I, device=device)


def gate(**config):
    for (weight, *_), threshold in zip(layers, thresholds, strict=True):
        count.zero_()
        grid = (triton.cdiv(I, config["ROWS"]),)
        kernels._gate[grid](x, weight, None, threshold, count, rows_n, a_n, I, H, CODE=0, **config)


def kept_lists():
    """What `_gate` leaves behind, for each copy: how many, which, and their activations, in random order."""
    for a, threshold in zip(activations, thresholds, strict=True):
        kept = (a.abs() > threshold).nonzero()[:, 0]
        kept = kept[torch.randperm(len(kept), device=device)].int()
        yield torch.tensor([len(kept)], dtype=torch.int32, device=device), kept, a[kept].float()


lists = list(kept_lists())


def up_down(**config):
    for (_, up, down), (n, rows, a) in zip(layers, lists, strict=True):
        kernels._up_down[(config["PROGRAMS"],)](x, up, down, None, n, rows, a, y, H, **config)


def sweep(name, run, configs, read):
    """Times every configuration that compiles, interleaved, and prints the fastest."""
    variants = {}
    for config in configs:
        try:
            run(**config)
        except triton.runtime.errors.OutOfResources:
            continue
        variants[str(config)] = lambda config=config: run(**config)
    times = Timer(variants, device).medians(9)
    for config, seconds in sorted(times.items(), key=lambda item: item[1])[: options.best]:
        each = seconds / options.copies
        print(f"{name:8} {each * 1e6:7.1f} us {read / each / 1e9:6.0f} GB/s  {config}")


bandwidth = read_bandwidth(device)
print(f"{torch.cuda.get_device_name()}, MLP {H} x {I}, bfloat16, read bandwidth {bandwidth / 1e9:.0f} GB/s")
columns = triton.next_power_of_2(H)
sweep(
    "gate", gate,
    [
        {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        for rows, block, warps in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096), (2, 4, 8))
        if 4 <= rows * block // (32 * warps) <= 128
    ],
    I * H * 2,
)  # fmt: skip
sweep(
    "up_down", up_down,
    [
        {"NEURONS": neurons, "BLOCK": columns, "num_warps": warps, "PROGRAMS": waves * kernels._multiprocessors(device)}
        for neurons, warps, waves in itertools.product((1, 2, 4, 8), (4, 8, 16), (1, 2, 3, 4))
        if neurons * columns // (32 * warps) <= 128
    ],
    sum(len(rows) for _, rows, _ in lists) / options.copies * 2 * H * 2,
)  # fmt: skip
