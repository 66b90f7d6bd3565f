"""One linear layer, dense against input-sparse and as codes, one token: microseconds, bytes, share of the read
bandwidth.

    python benchmarks/linear.py          # on a GPU if there is one: Mistral-7B shapes in bfloat16; else Llama-3.2-1B's
    python benchmarks/linear.py --shapes 4096x4096,4096x14336 --sparsity 0.5

Random weights, in several copies that are used in turn so that none stays in the cache. Dense is the better of float32
and bfloat16 on a CPU. Every case is compared with the reference before it is timed; times are medians of interleaved
runs. Rows of codes (int8, fp8) with sparsity 0 are `stored_linear`, which reads rows; the others are `sparse_linear`.
On a GPU "TEAL's way" is the published one (teal_published.py), its zeroing included, and a run is one CUDA graph of 32
layers or more: starting it takes as long as one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sandcat.measuring.speed import Timer, read_bandwidth
from sandcat.ops import CODED, Stored, kernel_name, sparse_linear, stored_linear
from sandcat.ops.sparse_linear import reference
from sandcat.rounding import quantised
from sandcat.support.devices import pick_device, pick_dtype

COPIES_BYTES = 256 << 20
LEAST_LAYERS = 32


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", help="default bfloat16, on a CPU float32 too")
    parser.add_argument("--shapes", help="inputs x outputs; default those of Mistral-7B, on a CPU of Llama-3.2-1B")
    parser.add_argument("--sparsity", default="0,0.5")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    shapes = options.shapes or ("4096x14336,14336x4096,4096x4096" if gpu else "2048x2048,2048x512,2048x8192,8192x2048")
    dtypes = options.dtype or ("bfloat16" if gpu else "bfloat16,float32")
    torch.manual_seed(0)
    bandwidth = read_bandwidth(device)
    kernels = ", ".join(kernel_name(op, device, "int8") for op in ("stored_linear", "sparse_linear"))
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, kernels {kernels}; read bandwidth {bandwidth / 1e9:.0f} GB/s")
    print("inputs x outputs  x         weight     sparsity dense us  here us   gain bytes allow  GB/s  of read")
    for I, O in (tuple(map(int, shape.split("x"))) for shape in shapes.split(",")):
        for dtype in (pick_dtype(name) for name in dtypes.split(",")):
            for sparsity in (float(s) for s in options.sparsity.split(",")):
                compare(I, O, dtype, sparsity, bandwidth, device, options.runs)


def codes(weight: Tensor, format: str) -> Stored:
    made, scale = quantised(weight, format=format)
    return Stored(made, scale[:, 0], format=format)


def by_inputs(weight: Tensor) -> Tensor:
    """The same matrix of bytes, stored by its inputs."""
    return weight.view(torch.int8).t().contiguous().t().view(weight.dtype)


def compare(I: int, O: int, dtype: torch.dtype, sparsity: float, bandwidth: float, device, runs: int) -> None:
    """Prints a row for weights in `dtype`, one for weights in each format and one for TEAL's way, each beside dense."""
    copies = max(2, COPIES_BYTES // (I * O * dtype.itemsize))
    weights = [(torch.randn(O, I, device=device) * I**-0.5).to(dtype) for _ in range(copies)]
    rows = [weight.t().contiguous() for weight in weights]
    wide = [weight.float() for weight in weights] if device.type == "cpu" else weights
    x = torch.randn(1, I, device=device).to(dtype)
    wide_x = x.to(wide[0].dtype)
    t = torch.full((I,), float(x.float().abs().quantile(sparsity)) if sparsity else -1.0, device=device).to(dtype)
    kept = float((x.abs() > t).float().mean())
    coded = {format: [codes(w, format) for w in weights * 2] for format in CODED}  # twice as many, to leave the cache
    by_channels = {format: [w._replace(codes=by_inputs(w.codes)) for w in made] for format, made in coded.items()}
    own, limit = text(dtype), 1e-5 if dtype == torch.float32 else 1e-2
    cases = {
        own: lambda i: sparse_linear(x, Stored(rows[i].t()), t),
        **{format: lambda i, made=made: sparse_linear(x, made[i], t) for format, made in by_channels.items()},
    }
    want = {own: reference(x, Stored(rows[0].t()), t)}
    want |= {format: reference(x, made[0], t) for format, made in by_channels.items()}
    limits = dict.fromkeys(cases, limit)
    if not sparsity:
        cases |= {format: lambda i, made=made: stored_linear(x, made[i]) for format, made in coded.items()}
    elif device.type == "cuda":
        from teal_published import teal  # here, as not every machine has Triton

        cases["TEAL's way"] = lambda i: teal(x[0], [rows[i]], [t])[None]
        want["TEAL's way"], limits["TEAL's way"] = want[own], 10 * limit  # its atomics add up in the dtype
    for name, case in cases.items():
        error = float((case(0) - want[name]).norm() / want[name].norm())
        if not error < limits[name]:
            raise SystemExit(f"the kernel is wrong ({name}): relative error {error:.1e}, so nothing is timed")
    layers = max(2 * copies, LEAST_LAYERS if device.type == "cuda" else 0)
    dense = {"dense": lambda i: F.linear(x, weights[i]), "wide": lambda i: F.linear(wide_x, wide[i])}

    def run(name: str, case: Callable[[int], object]) -> Callable[[], object]:
        own = 2 * copies if name in CODED else copies
        return lambda: [case(i % own) for i in range(layers)]

    times = Timer({name: run(name, case) for name, case in (dense | cases).items()}, device).medians(runs)
    best = min(times[name] for name in dense) / layers
    for name in cases:
        size = 1 if name in CODED else dtype.itemsize
        took, moved = times[name] / layers, kept * I * O * size
        print(
            f"{I:>6} x {O:<7} {own:9} {name:10} {sparsity:>8.2f} {best * 1e6:>8.1f} {took * 1e6:>8.1f} "
            f"{best / took:>5.2f}x {dtype.itemsize / size / kept:>10.2f}x {moved / took / 1e9:>5.0f} "
            f"{moved / took / bandwidth:>8.0%}"
        )


def text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
