"""Attention of one decode step over pages: sequences of one length and of lengths that differ by 10, beside PyTorch's
attention over a contiguous cache of one length.

    python benchmarks/attend.py                  # Llama-3-8B's heads; 32,768 tokens in all on a GPU, 8,192 on a CPU
    python benchmarks/attend.py --tokens 131072 --batch 1,8 --page 16,256

Random numbers, in several caches that are used in turn so that none stays in the processor's, with pages in random
order. Every case is compared with the reference (on a GPU PyTorch's attention) before it is timed; times are medians of
interleaved runs, on a GPU of one CUDA graph of many layers. "Over equal" is over sequences of one length with pages of
that size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sandcat.measuring.speed import Timer, read_bandwidth
from sandcat.ops import kernel_name, paged_attention
from sandcat.ops.paged_attention import Pages, Rows
from sandcat.support.devices import pick_device, pick_dtype

COPIES_BYTES = 512 << 20
LAYERS = 32
TIMES = 10
"""How much longer the longest sequence is."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, help="of all sequences; default 32768, on a CPU 8192")
    parser.add_argument("--batch", default="4,8")
    parser.add_argument("--heads", default="32x8x128", help="query heads x key-value heads x their size")
    parser.add_argument("--page", default="16,64,256", help="tokens of a page")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    gpu = device.type == "cuda"
    tokens, heads = options.tokens or (32768 if gpu else 8192), tuple(map(int, options.heads.split("x")))
    torch.manual_seed(0)
    bandwidth = read_bandwidth(device)
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, {dtype}, kernel {kernel_name('paged_attention', device)}; read bandwidth ",
        end="",
    )
    print(f"{bandwidth / 1e9:.0f} GB/s")
    print("sequences lengths               page       us  GB/s  of read  over equal")
    for batch in map(int, options.batch.split(",")):
        compare(batch, tokens, heads, tuple(map(int, options.page.split(","))), dtype, device, bandwidth, options.runs)


def compare(batch: int, tokens: int, heads, pages, dtype: torch.dtype, device, bandwidth: float, runs: int) -> None:
    """Prints the rows of so many sequences."""
    (H, N, D), short = heads, tokens // (batch - 1 + TIMES)
    longest = tokens - short * (batch - 1)
    lengths = {"equal": [tokens // batch] * batch}
    if batch > 1:
        lengths |= {
            "longest first": [longest] + [short] * (batch - 1),
            "longest last": [short] * (batch - 1) + [longest],
        }
    size = 2 * tokens * N * D * dtype.itemsize
    copies = max(2, -(-COPIES_BYTES // size))
    layers = max(copies, LAYERS if device.type == "cuda" else 0)
    q = torch.randn(batch, H, D, device=device).to(dtype)
    cases = {"PyTorch": contiguous(q, tokens // batch, N, copies, layers)}
    for page in pages:
        for which, each in lengths.items():
            cases[which, page] = paged(q, each, N, page, copies, layers)
    times = Timer(cases, device).medians(runs)
    for case, seconds in times.items():
        which, page = ("equal", "-") if case == "PyTorch" else case
        took = seconds / layers
        over = "" if which == "equal" else f"{seconds / times['equal', page]:.3f}x"
        print(
            f"{batch:>9} {which:15} {'PyTorch' if case == 'PyTorch' else '':7} {page:>4} {took * 1e6:>8.1f} "
            f"{size / took / 1e9:>5.0f} {size / took / bandwidth:>8.0%}  {over:>10}"
        )


def contiguous(q_BHD: Tensor, length: int, N: int, copies: int, layers: int) -> Callable[[], object]:
    """PyTorch's attention, of sequences of one length."""
    shape = (2, len(q_BHD), N, length, q_BHD.shape[-1])
    caches = [torch.randn(shape, device=q_BHD.device, dtype=q_BHD.dtype) for _ in range(copies)]
    q = q_BHD[:, :, None]
    return lambda: [F.scaled_dot_product_attention(q, *caches[i % copies], enable_gqa=True) for i in range(layers)]


def paged(q_BHD: Tensor, lengths: list[int], N: int, page: int, copies: int, layers: int) -> Callable[[], object]:
    """Ours, of sequences of these lengths.

    Raises:
        SystemExit: it is wrong.
    """
    B, D, device = len(q_BHD), q_BHD.shape[-1], q_BHD.device
    entries = -(-max(lengths) // page)
    used_BM = torch.arange(entries)[None] * page < torch.tensor(lengths)[:, None]
    count = int(used_BM.sum()) * N
    caches = []
    for _ in range(copies):
        table_BNM = torch.zeros(B, N, entries, dtype=torch.int32)
        table_BNM[used_BM[:, None].expand(B, N, -1)] = torch.randperm(count).int()
        pool = torch.randn(2, count, page, 1, D, device=device, dtype=q_BHD.dtype).expand(-1, -1, -1, N, -1)
        length_BN = torch.tensor(lengths, dtype=torch.int32, device=device)[:, None].repeat(1, N)
        caches.append(Pages([pool[0]], [pool[1]], table_BNM.to(device), torch.zeros_like(length_BN), length_BN))
    first_B = torch.arange(B + 1, dtype=torch.int32, device=device)

    def run(cached: Pages) -> Tensor:
        return paged_attention(q_BHD, cached, Rows(first_B, 1), D**-0.5, None, None)

    for b in range(B):
        index = torch.arange(lengths[b], device=device)
        entry = caches[0].table_BNM[b][:, index // page].long()
        k, v = (pages[0][entry, index % page, 0].float()[None] for pages in (caches[0].keys, caches[0].values))
        want = F.scaled_dot_product_attention(q_BHD[b : b + 1, :, None].float(), k, v, enable_gqa=True)[0, :, 0]
        error = float((run(caches[0])[b] - want).norm() / want.norm())
        if not error < 1e-2:
            raise SystemExit(f"the kernel is wrong (lengths {lengths}, page {page}): relative error {error:.1e}")
    return lambda: [run(caches[i % copies]) for i in range(layers)]


if __name__ == "__main__":
    main()
