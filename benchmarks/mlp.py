"""One MLP, dense against sparse, at the shapes of a real model: microseconds, bytes, share of the read bandwidth.

    python benchmarks/mlp.py                    # on a GPU if there is one: Mistral-7B shapes; else Llama-3.2-1B shapes
    python benchmarks/mlp.py --hidden 4096 --neurons 11008 --dtype float16 --tokens 1,2,4

Random weights, in several copies that are used in turn so that none stays in the cache. Dense is the best of what
PyTorch has for the same dtype (on a CPU, float32 too). Every variant is compared with the reference before it is timed;
times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from sandcat.measuring.speed import Timer, read_bandwidth
from sandcat.ops import Stored, kernel_name
from sandcat.ops.checks import MAX_TOKENS
from sandcat.ops.sparse_mlp import reference, sparse_mlp
from sandcat.support.devices import pick_device, pick_dtype


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--neurons", type=int)
    parser.add_argument("--copies", type=int)
    parser.add_argument("--tokens", default="1,2,4,8")
    parser.add_argument("--sparsity", default="0,0.5,0.7,0.8,0.9")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    gpu = device.type == "cuda"
    H, I = options.hidden or (4096 if gpu else 2048), options.neurons or (14336 if gpu else 8192)
    copies = options.copies or (6 if gpu else 8)
    rounds = 4 if gpu else 1  # starting a CUDA graph takes as long as a small layer
    torch.manual_seed(0)

    def weights():
        gate, up, down = ((torch.randn(I, H, device=device) * H**-0.5).to(dtype) for _ in range(3))
        return gate, up, down, down.t().contiguous()  # the dense MLP gets its own usual layout

    layers = [weights() for _ in range(copies)]
    bandwidth = read_bandwidth(device)
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; read bandwidth {bandwidth / 1e9:.0f} GB/s")
    print(f"MLP {H} x {I}, {dtype}, {copies} copies in turn")
    print(f"kernel: {kernel_name('sparse_mlp', device)}")
    print("tokens sparsity  union  dense us sparse us   gain bytes allow   GB/s  of read    error")

    @torch.inference_mode()
    def measure(tokens: int, sparsity: float) -> None:
        x = torch.randn(tokens, H, device=device).to(dtype)
        thresholds = []
        for gate, *_ in layers:
            a = F.silu(F.linear(x, gate)).float().abs().flatten()
            level = float(a[: 2**24].quantile(sparsity)) if sparsity else -1.0
            while bool(((a - level).abs() <= 1e-5 * abs(level)).any()):  # so near that another order of sums decides
                level *= 1 + 3e-5
            thresholds.append(torch.full((I,), level, device=device).to(dtype))
        error, union = 0.0, 0.0
        for (gate, up, down, _), threshold in zip(layers, thresholds, strict=True):
            found, want = (
                sparse_mlp(x, Stored(gate), Stored(up), Stored(down.t()), threshold, "silu"),
                reference(x, Stored(gate), Stored(up), Stored(down.t()), threshold, "silu"),
            )
            error = max(error, float((found - want).norm() / want.norm()))
            union += float((F.silu(F.linear(x, gate)).abs() > threshold).any(0).float().mean()) / copies
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        if not error < limit:
            raise SystemExit(f"the kernel is wrong: relative error {error:.1e}, so nothing is timed")

        def dense():
            for gate, up, _, down in layers * rounds:
                F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        def sparse():
            for (gate, up, down, _), threshold in list(zip(layers, thresholds, strict=True)) * rounds:
                sparse_mlp(x, Stored(gate), Stored(up), Stored(down.t()), threshold, "silu")

        variants = {"dense": dense, "sparse": sparse}
        if not gpu and dtype != torch.float32:
            wide = [tuple(w.float() for w in (gate, up, down)) for gate, up, _, down in layers]

            def dense32():
                for gate, up, down in wide * rounds:
                    F.linear(F.silu(F.linear(x.float(), gate)) * F.linear(x.float(), up), down)

            variants["dense32"] = dense32
        times = Timer(variants, device).medians(options.runs)
        best = min(times["dense"], times.get("dense32", times["dense"])) / copies / rounds
        took = times["sparse"] / copies / rounds
        moved = I * H * layers[0][0].element_size() * (1 + 2 * union)
        allowed = 3 / (1 + 2 * union)
        print(
            f"{tokens:>6} {sparsity:>8.2f} {union:>6.2f} {best * 1e6:>9.1f} {took * 1e6:>9.1f} {best / took:>5.2f}x "
            f"{allowed:>10.2f}x {moved / took / 1e9:>6.0f} {moved / took / bandwidth:>8.0%} {error:>8.1e}"
        )

    for tokens in (int(t) for t in options.tokens.split(",")):
        if not 1 <= tokens <= MAX_TOKENS:
            raise SystemExit(f"--tokens: 1 to {MAX_TOKENS} at a time")
        for sparsity in (float(s) for s in options.sparsity.split(",")):
            measure(tokens, sparsity)


if __name__ == "__main__":
    main()
