"""CUDA kernels of an MLP's up and down for several tokens: a list of the neurons that any token keeps, or that all
share, whose rows are read once for all tokens and multiplied in the matrix unit. Shapes: see ops/sparse_mlp.py; n
listed neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.shared_units import GROUP
from sandcat.ops.triton.primitives.blocks import append, as_dtype, clear
from sandcat.ops.triton.primitives.launch import code_of, codes, dependent_launch, multiprocessors
from sandcat.ops.triton.sparse_linear_batch import LEAST, TOKENS, first_of_groups
from sandcat.ops.weights import Stored


@triton.jit
def list_neurons(
    a, threshold, count, list_n, a_nT, keep_n, T, I,
    SHARED: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, NEURONS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Lists neurons, with what their gates gave, and which tokens use them, a bit a token."""
    rows = tl.program_id(0) * NEURONS + tl.arange(0, NEURONS)
    limit = tl.load(threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(limit, LEAST)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total, kept = tl.zeros((NEURONS,), tl.float32), tl.zeros((NEURONS,), tl.int32)
    bits = kept
    for t in tl.static_range(TOKENS):
        here = (rows < I) & (t < T)
        size = tl.abs(tl.load(a + t * I + rows, mask=here, other=0.0).to(tl.float32))
        keep = (here & ~(size <= limit)).to(tl.int32)
        kept += keep
        bits += keep << t
        if SHARED:
            total += (size * inverse) * (size * inverse)
    if SHARED:
        wanted = first_of_groups(total, kept, rows < I, T, NEURONS, GROUP)
        bits = tl.where(wanted, (1 << T) - 1, 0)
    place = append(list_n, count, rows, bits != 0)
    tl.store(keep_n + place, bits, mask=bits != 0)
    for t in tl.static_range(TOKENS):
        here = (rows < I) & (t < T)
        a_u = tl.load(a + t * I + rows, mask=here, other=0.0).to(tl.float32)
        tl.store(a_nT + place * STRIDE + t, a_u, mask=bits != 0)


@triton.jit
def up_tokens(
    x, up, bias, scale, count, list_n, a_nT, keep_n, h_nT, T, H,
    FORMAT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h = a * up(x) of the listed neurons, 0 where a token does not keep one; a and h are [n, TOKENS]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.load(count)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = x.dtype.element_ty
    if tl.program_id(0) * ROWS < n:
        t = tl.arange(0, TOKENS)
        row = tl.load(list_n + i, mask=i < n, other=0).to(tl.int64)
        u = tl.zeros((ROWS, TOKENS), tl.float32)
        for start in tl.range(0, H, BLOCK, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK)
            here = (i < n)[:, None] & (k < H)[None, :]
            w = tl.load(up + row[:, None] * H + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
            x_kt = tl.load(x + t[None, :] * H + k[:, None], mask=(t < T)[None, :] & (k < H)[:, None], other=0.0)
            u = tl.dot(as_dtype(w, dtype, FORMAT), x_kt, u, input_precision="ieee")
        if scale is not None:
            u *= tl.load(scale + row, mask=i < n, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            u += tl.load(bias + row, mask=i < n, other=0.0).to(tl.float32)[:, None]
        at = i[:, None] * TOKENS + t[None, :]
        a = tl.load(a_nT + at, mask=(i < n)[:, None], other=0.0)
        keep = (tl.load(keep_n + i, mask=i < n, other=0)[:, None] >> t[None, :]) & 1
        h = tl.where(keep == 1, a * u.to(dtype).to(tl.float32), 0.0)
        tl.store(h_nT + at, h.to(dtype), mask=(i < n)[:, None])


@triton.jit
def down_tokens(
    h_nT, down, scale, count, list_n, y, T, H, FORMAT: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y += down of the listed neurons, of every token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.load(count)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, n, SPLITS * ROWS, num_stages=STAGES):
        i = start + tl.arange(0, ROWS)
        row = tl.load(list_n + i, mask=i < n, other=0).to(tl.int64)
        here = (i < n)[:, None] & (k < H)[None, :]
        w = tl.load(down + row[:, None] * H + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        h = tl.load(h_nT + i[None, :] * TOKENS + t[:, None], mask=(i < n)[None, :], other=0.0)
        total = tl.dot(h, as_dtype(w, h.dtype, FORMAT), total, input_precision="ieee")
    if tl.program_id(1) * ROWS < n:
        if scale is not None:
            total *= tl.load(scale + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        mask = (t < T)[:, None] & (k < H)[None, :]
        tl.atomic_add(y + t[:, None] * H + k[None, :], total, mask=mask, sem="relaxed")


def list_neurons_config(tokens: int) -> dict:
    """Neurons that a program of `list_neurons` takes, and of a group; tokens, and places that a neuron has for them."""
    padded = triton.next_power_of_2(tokens)
    return {"STRIDE": TOKENS, "TOKENS": padded, "NEURONS": 128, "GROUP": GROUP, "num_warps": 4}


def up_tokens_config(itemsize: int, *, rows: int = 64, block: int = 256, stages: int = 3, warps: int = 4) -> dict:
    """Neurons that a program of `up_tokens` takes, and columns at a time."""
    return {
        "TOKENS": TOKENS,
        "ROWS": rows,
        "BLOCK": block * 2 // max(2, itemsize),
        "STAGES": stages,
        "num_warps": warps,
    }


def down_tokens_config(
    hidden: int, itemsize: int, multiprocessors: int,
    *, rows: int = 16, block: int = 256, stages: int = 2, warps: int = 4, programs: int = 6,
) -> tuple[dict, tuple[int, int]]:  # fmt: skip
    """Neurons that a program of `down_tokens` takes at a time, and its columns; the grid: columns, parts of lists."""
    block = block * 2 // max(2, itemsize)
    columns = triton.cdiv(hidden, block)
    splits = max(1, programs * multiprocessors // columns)
    config = {"TOKENS": TOKENS, "ROWS": rows, "BLOCK": block, "STAGES": stages, "SPLITS": splits, "num_warps": warps}
    return config, (columns, splits)


def add_tokens(
    x_TH: Tensor, a_TI: Tensor, up: Stored, down: Stored, threshold_I: Tensor, *, shared: bool
) -> Tensor:  # fmt: skip
    """Up and down of the neurons that any token keeps, or that all share, without down's bias; float32 [T, H]."""
    tensors = (x_TH, a_TI, codes(up), codes(down).t(), threshold_I, up.bias, up.scale, down.scale)
    tensors = (None if t is None else t.contiguous() for t in tensors)
    x, a, up_rows, down_rows, threshold, up_bias, up_scale, down_scale = tensors
    (T, H), I, device = x.shape, len(up_rows), x.device
    y_TH = torch.empty(T, H, dtype=torch.float32, device=device)
    count, list_n, keep_n = (torch.empty(size, dtype=torch.int32, device=device) for size in (1, I, I))
    a_nT = torch.empty(I, TOKENS, dtype=torch.float32, device=device)
    h_nT = torch.empty(I, TOKENS, dtype=x.dtype, device=device)
    dependent = dependent_launch(device)
    with torch.cuda.device(device):
        clear[(triton.cdiv(T * H, 1024),)](y_TH, count, T * H, BLOCK=1024, **dependent)
        config = list_neurons_config(T)
        list_neurons[(triton.cdiv(I, config["NEURONS"]),)](
            a, threshold, count, list_n, a_nT, keep_n, T, I, SHARED=shared, **config, **dependent
        )  # fmt: skip
        config = up_tokens_config(x.element_size())
        up_tokens[(triton.cdiv(I, config["ROWS"]),)](
            x, up_rows, up_bias, up_scale, count, list_n, a_nT, keep_n, h_nT, T, H, FORMAT=code_of(up.format), **config,
            **dependent,
        )  # fmt: skip
        config, grid = down_tokens_config(H, x.element_size(), multiprocessors(device))
        down_tokens[grid](
            h_nT, down_rows, down_scale, count, list_n, y_TH, T, H, FORMAT=code_of(down.format), **config, **dependent
        )  # fmt: skip
    return y_TH
