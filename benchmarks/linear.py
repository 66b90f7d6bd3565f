"""One linear layer, dense against input-sparse, one token: microseconds, bytes, share of the read bandwidth.

    python benchmarks/linear.py                    # Llama-3.2-1B shapes, float32 and bfloat16
    python benchmarks/linear.py --shapes 4096x4096,4096x14336 --sparsity 0.5

Random weights, in several copies that are used in turn so that none stays in the cache. Dense is the better of float32
and bfloat16 on a CPU. Every case is compared with the reference before it is timed; times are medians of interleaved
runs.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from sandcat.benchmark import Timer, read_bandwidth
from sandcat.hub import pick_device, pick_dtype
from sandcat.ops import kernel_name
from sandcat.ops.sparse_linear import reference, sparse_linear

COPIES_BYTES = 256 << 20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16,float32")
    parser.add_argument("--shapes", default="2048x2048,2048x512,2048x8192,8192x2048", help="inputs x outputs")
    parser.add_argument("--sparsity", default="0,0.4,0.5,0.7")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.manual_seed(0)
    bandwidth = read_bandwidth(device)
    print(f"kernel {kernel_name('sparse_linear', device)}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads; read bandwidth {bandwidth / 1e9:.0f} GB/s")  # fmt: skip
    print("inputs x outputs  dtype     sparsity dense us sparse us   gain bytes allow  GB/s  of read    error")
    for I, O in (tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")):
        for dtype in (pick_dtype(name) for name in options.dtype.split(",")):
            copies = max(2, COPIES_BYTES // (I * O * dtype.itemsize))
            weights = [(torch.randn(O, I, device=device) * I**-0.5).to(dtype) for _ in range(copies)]
            rows = [weight.t().contiguous() for weight in weights]
            wide = [weight.float() for weight in weights] if device.type == "cpu" else weights
            x = torch.randn(1, I, device=device).to(dtype)
            wide_x = x.to(wide[0].dtype)
            for sparsity in (float(s) for s in options.sparsity.split(",")):
                level = float(x.float().abs().quantile(sparsity)) if sparsity else -1.0
                t = torch.full((I,), level, device=device).to(dtype)
                found, want = sparse_linear(x, rows[0], t), reference(x, rows[0], t)
                error = float((found - want).norm() / want.norm())
                if not error < (1e-5 if dtype == torch.float32 else 1e-2):
                    raise SystemExit(f"the kernel is wrong: relative error {error:.1e}, so nothing is timed")
                times = Timer(
                    {
                        "dense": lambda x=x, weights=weights: [F.linear(x, w) for w in weights],
                        "wide": lambda x=wide_x, wide=wide: [F.linear(x, w) for w in wide],
                        "sparse": lambda x=x, rows=rows, t=t: [sparse_linear(x, w, t) for w in rows],
                    },
                    device,
                ).medians(options.runs)
                dense, took = min(times["dense"], times["wide"]) / copies, times["sparse"] / copies
                kept = float((x.abs() > t).float().mean())
                moved = kept * I * O * dtype.itemsize
                print(
                    f"{I:>6} x {O:<7} {str(dtype).removeprefix('torch.'):9} {sparsity:>8.2f} {dense * 1e6:>8.0f} "
                    f"{took * 1e6:>9.0f} {dense / took:>5.2f}x {1 / kept:>10.2f}x {moved / took / 1e9:>5.0f} "
                    f"{moved / took / bandwidth:>8.0%} {error:>8.1e}"
                )


if __name__ == "__main__":
    main()
