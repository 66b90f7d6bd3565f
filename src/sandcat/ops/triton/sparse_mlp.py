"""CUDA kernels of `sandcat::sparse_mlp`. Shapes: see ops/sparse_mlp.py.

`_clear` zeroes the sums and the counter. One token: `gate_kernel` computes a = act(gate(x)) for all neurons and appends
the kept ones to a list; `up_down_kernel` walks the list, a few neurons at a time: up row . x, times a, times the down
row, summed in registers over all of a program's neurons, so that the intermediate state never leaves the chip; one
atomic add a program and column at the end. Several tokens: the same list of all neurons that any token keeps, with
tensor-core products for up and down.

Sums are float32; gate, up and their product are rounded to the model's dtype as the reference rounds them. From compute
capability 9.0 on, a kernel is launched while the one before it still runs (programmatic dependent launch) and waits
where it first needs its results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.sparse_mlp import ACTIVATIONS, check_arguments, reference, sparse_mlp
from sandcat.ops.triton.launch import dependent_launch, multiprocessors

OPS, INT8_OPS = ("sparse_mlp",), ()
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_SILU, _GELU, _GELU_TANH = (tl.constexpr(CODES[name]) for name in ("silu", "gelu", "gelu_tanh"))

TOKENS = 16
"""Tokens are padded to this for the tensor cores."""


@triton.jit
def activate(g, CODE: tl.constexpr):
    if CODE == _SILU:
        return g / (1.0 + tl.exp(-g))
    if CODE == _GELU:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if CODE == _GELU_TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        return 0.5 * g * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    return tl.where(g <= 0, 0.0, g)


@triton.jit
def activated(g, dtype: tl.constexpr, CODE: tl.constexpr):
    """act(g), rounded where the reference rounds."""
    return activate(g.to(dtype).to(tl.float32), CODE).to(dtype).to(tl.float32)


@triton.jit
def gated(g, u, dtype: tl.constexpr, CODE: tl.constexpr):
    """act(g) * u, rounded where the reference rounds."""
    return (activated(g, dtype, CODE) * u).to(dtype).to(tl.float32)


@triton.jit
def _finish_gate(g, bias, rows, I, CODE: tl.constexpr, dtype: tl.constexpr):
    """act(g + bias), rounded where the reference rounds."""
    if bias is not None:
        g += tl.load(bias + rows, mask=rows < I, other=0.0).to(tl.float32)
    return activated(g, dtype, CODE)


@triton.jit
def append(list_n, count, rows, wanted):
    """Appends the wanted rows to the list; their places in it."""
    base = tl.atomic_add(count, tl.sum(wanted.to(tl.int32)), sem="relaxed")
    place = base + tl.cumsum(wanted.to(tl.int32)) - 1
    tl.store(list_n + place, rows, mask=wanted)
    return place


@triton.jit
def _clear(y, count, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()  # before the next kernel may start: that one reads weights, which must be written by now
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.zeros((BLOCK,), tl.float32), mask=i < n)
    if tl.program_id(0) == 0:
        tl.store(count, 0)


@triton.jit
def load_rows(w, rows, N, k, K):
    """Rows of a matrix of N rows and K columns; those beyond its end are zero. Nothing reads them again."""
    here = (rows < N)[:, None] & (k < K)[None, :]
    at = w + rows.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(at, mask=here, other=0, eviction_policy="evict_first")


@triton.jit
def gate_kernel(
    x, norm, eps, gate, bias, threshold, count, list_n, a_n, x_normed, I, H,
    CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """With `norm`, x is normed first (which is a number that the sums are multiplied with), and kept in x_normed."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = gate + rows.to(tl.int64)[:, None] * H
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = (rows < I)[:, None] & (k < H)[None, :]
        w = tl.load(at + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        x_k = tl.load(x + k, mask=k < H, other=0.0).to(tl.float32)
        if norm is not None:
            square += x_k * x_k
            x_k *= tl.load(norm + k, mask=k < H, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x_k[None, :]
    if PDL:
        gdc_launch_dependents()
    g = tl.sum(total, 1)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(square) / H + eps)
        g *= scale
        if tl.program_id(0) == 0:
            for start in range(0, H, BLOCK):
                k = start + tl.arange(0, BLOCK)
                x_k = tl.load(x + k, mask=k < H, other=0.0).to(tl.float32) * scale
                x_k *= tl.load(norm + k, mask=k < H, other=0.0).to(tl.float32)
                tl.store(x_normed + k, x_k.to(x_normed.dtype.element_ty), mask=k < H)
    a = _finish_gate(g, bias, rows, I, CODE, gate.dtype.element_ty)
    t = tl.load(threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    wanted = (rows < I) & ~(tl.abs(a) <= t)
    place = append(list_n, count, rows, wanted)
    tl.store(a_n + place, a, mask=wanted)


@triton.jit
def up_down_kernel(
    x, up, down, bias, count, list_n, a_n, y, I, H, NEURONS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    dtype: tl.constexpr = up.dtype.element_ty
    first, step = tl.program_id(0) * NEURONS, tl.num_programs(0) * NEURONS
    i = first + tl.arange(0, NEURONS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.load(count)
    row = tl.load(list_n + i, mask=i < n, other=I)
    row_ahead = tl.load(list_n + i + step, mask=i + step < n, other=I)
    w_up, w_down = load_rows(up, row, I, k, H), load_rows(down, row, I, k, H)
    x_k = tl.load(x + k, mask=k < H, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, n, step):
        i = start + tl.arange(0, NEURONS)
        up_ahead, down_ahead = load_rows(up, row_ahead, I, k, H), load_rows(down, row_ahead, I, k, H)
        row_next = row_ahead
        row_ahead = tl.load(list_n + i + 2 * step, mask=i + 2 * step < n, other=I)
        a = tl.load(a_n + i, mask=i < n, other=0.0)
        u = tl.sum(w_up.to(tl.float32) * x_k.to(tl.float32)[None, :], 1)
        if bias is not None:
            u += tl.load(bias + row, mask=i < n, other=0.0).to(tl.float32)
        h = (a * u.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        total += tl.sum(h[:, None] * w_down.to(tl.float32), 0)
        row, w_up, w_down = row_next, up_ahead, down_ahead
    if first < n:
        tl.atomic_add(y + k, total, mask=k < H, sem="relaxed")


@triton.jit
def _gate_tokens(
    x, gate, bias, threshold, count, list_n, a_nT, keep_n, T, I, H,
    CODE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    at = gate + rows.to(tl.int64)[:, None] * H
    g = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(at + k[None, :], mask=(rows < I)[:, None] & (k < H)[None, :], other=0.0)
        x_kt = tl.load(x + t[None, :] * H + k[:, None], mask=(t < T)[None, :] & (k < H)[:, None], other=0.0)
        g = tl.dot(w, x_kt, g, input_precision="ieee")
    if bias is not None:
        g += tl.load(bias + rows, mask=rows < I, other=0.0).to(tl.float32)[:, None]
    a = _finish_gate(g, None, rows, I, CODE, gate.dtype.element_ty)
    limit = tl.load(threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    keep = ~(tl.abs(a) <= limit[:, None]) & (t < T)[None, :] & (rows < I)[:, None]
    keep_bits = tl.sum(keep.to(tl.int32) << t[None, :], 1)
    wanted = keep_bits != 0
    place = append(list_n, count, rows, wanted)
    tl.store(keep_n + place, keep_bits, mask=wanted)
    tl.store(a_nT + place[:, None] * TOKENS + t[None, :], a, mask=wanted[:, None])


@triton.jit
def _up_tokens(
    x, up, bias, count, list_n, a_nT, keep_n, h_nT, T, H, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.load(count)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < n:
        t = tl.arange(0, TOKENS)
        row = tl.load(list_n + i, mask=i < n, other=0).to(tl.int64)
        u = tl.zeros((ROWS, TOKENS), tl.float32)
        for start in range(0, H, BLOCK):
            k = start + tl.arange(0, BLOCK)
            w = tl.load(up + row[:, None] * H + k[None, :], mask=(i < n)[:, None] & (k < H)[None, :], other=0.0)
            x_kt = tl.load(x + t[None, :] * H + k[:, None], mask=(t < T)[None, :] & (k < H)[:, None], other=0.0)
            u = tl.dot(w, x_kt, u, input_precision="ieee")
        if bias is not None:
            u += tl.load(bias + row, mask=i < n, other=0.0).to(tl.float32)[:, None]
        at = i[:, None] * TOKENS + t[None, :]
        a = tl.load(a_nT + at, mask=(i < n)[:, None], other=0.0)
        keep = (tl.load(keep_n + i, mask=i < n, other=0)[:, None] >> t[None, :]) & 1
        h = tl.where(keep == 1, a * u.to(up.dtype.element_ty).to(tl.float32), 0.0)
        tl.store(h_nT + at, h.to(up.dtype.element_ty), mask=(i < n)[:, None])


@triton.jit
def _down_tokens(
    h_nT, down, count, list_n, y, T, H, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.load(count)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(tl.program_id(1) * ROWS, n, SPLITS * ROWS):
        i = start + tl.arange(0, ROWS)
        row = tl.load(list_n + i, mask=i < n, other=0).to(tl.int64)
        w = tl.load(down + row[:, None] * H + k[None, :], mask=(i < n)[:, None] & (k < H)[None, :], other=0.0)
        h = tl.load(h_nT + i[None, :] * TOKENS + t[:, None], mask=(i < n)[None, :], other=0.0)
        total = tl.dot(h, w, total, input_precision="ieee")
    if tl.program_id(1) * ROWS < n:
        mask = (t < T)[:, None] & (k < H)[None, :]
        tl.atomic_add(y + t[:, None] * H + k[None, :], total, mask=mask, sem="relaxed")


def gate_config(hidden: int, itemsize: int) -> dict:
    """Rows and columns that a program of `gate_kernel` takes at a time, and its warps."""
    return {"ROWS": 16, "BLOCK": 512 // itemsize, "num_warps": 4}


def up_down_config(hidden: int, itemsize: int) -> dict:
    """Neurons that a program takes at a time, its columns (all), its warps, and programs a multiprocessor."""
    block = triton.next_power_of_2(hidden)
    neurons = max(1, min(4, 16384 // (block * itemsize)))
    return {"NEURONS": neurons, "BLOCK": block, "num_warps": 8, "per_multiprocessor": 2}


def rows_config(itemsize: int) -> dict:
    """Neurons and columns that `_gate_tokens` and `_up_tokens` multiply at a time."""
    return {"TOKENS": TOKENS, "ROWS": 16, "BLOCK": 512 // itemsize, "num_warps": 4}


def columns_config(itemsize: int) -> dict:
    """Neurons and columns that `_down_tokens` multiplies at a time."""
    return {"TOKENS": TOKENS, "ROWS": 32, "BLOCK": 256 // itemsize, "num_warps": 4}


@sparse_mlp.register_kernel("cuda")
def launch(
    x_TH: Tensor,
    gate_IH: Tensor,
    up_IH: Tensor,
    down_IH: Tensor,
    threshold_I: Tensor,
    activation: str,
    gate_bias_I: Tensor | None = None,
    up_bias_I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    gate_scale_I: Tensor | None = None,
    up_scale_I: Tensor | None = None,
    down_scale_H: Tensor | None = None,
) -> Tensor:
    T, H = x_TH.shape
    I = gate_IH.shape[0]
    biases = (gate_bias_I, up_bias_I, down_bias_H)
    scales = (gate_scale_I, up_scale_I, down_scale_H)
    check_arguments("sparse_mlp", x_TH, gate_IH, None, up_IH, down_IH, threshold_I, *biases, *scales)
    if any(scale is not None for scale in scales):
        return reference(x_TH, gate_IH, up_IH, down_IH, threshold_I, activation, *biases, *scales)
    tensors = (x_TH, gate_IH, up_IH, down_IH, threshold_I, gate_bias_I, up_bias_I)
    x, gate, up, down, threshold, gate_bias, up_bias = (None if t is None else t.contiguous() for t in tensors)
    code, itemsize, device = CODES[activation], gate.element_size(), x.device
    y_TH = torch.empty(T, H, dtype=torch.float32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    list_n = torch.empty(I, dtype=torch.int32, device=device)
    dependent = dependent_launch(device)
    with torch.cuda.device(device):
        _clear[(triton.cdiv(T * H, 1024),)](y_TH, count, T * H, BLOCK=1024, **dependent)
        if T == 1:
            a_n = torch.empty(I, dtype=torch.float32, device=device)
            config = gate_config(H, itemsize)
            grid = (triton.cdiv(I, config["ROWS"]),)
            gate_kernel[grid](
                x,
                None,
                0.0,
                gate,
                gate_bias,
                threshold,
                count,
                list_n,
                a_n,
                None,
                I,
                H,
                CODE=code,
                **config,
                **dependent,
            )
            config = up_down_config(H, itemsize)
            grid = (multiprocessors(device) * config.pop("per_multiprocessor"),)
            up_down_kernel[grid](x, up, down, up_bias, count, list_n, a_n, y_TH, I, H, **config, **dependent)
        else:
            a_nT = torch.empty(I, TOKENS, dtype=torch.float32, device=device)
            h_nT = torch.empty(I, TOKENS, dtype=gate.dtype, device=device)
            keep_n = torch.empty_like(list_n)
            config = rows_config(itemsize)
            grid = (triton.cdiv(I, config["ROWS"]),)
            _gate_tokens[grid](x, gate, gate_bias, threshold, count, list_n, a_nT, keep_n, T, I, H, CODE=code, **config)
            _up_tokens[grid](x, up, up_bias, count, list_n, a_nT, keep_n, h_nT, T, H, **config)
            config = columns_config(itemsize)
            columns = triton.cdiv(H, config["BLOCK"])
            splits = max(1, 4 * multiprocessors(device) // columns)
            _down_tokens[(columns, splits)](h_nT, down, count, list_n, y_TH, T, H, SPLITS=splits, **config)
    return y_TH if down_bias_H is None else y_TH + down_bias_H
