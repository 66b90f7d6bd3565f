"""CUDA kernels of `sandcat::sparse_mlp`. Shapes: see ops/sparse_mlp.py.

`_clear` zeroes the sums and the counter. One token: `_gate` computes a = act(gate(x)) for all neurons and appends the
kept ones to a list; `_up_down` walks the list, a few neurons at a time: up row . x, times a, times the down row, summed
in registers over all of a program's neurons, so that the intermediate state never leaves the chip; one atomic add a
program and column at the end. Several tokens: the same list of all neurons that any token keeps, with tensor-core
products for up and down.

Sums are float32; gate, up and their product are rounded to the model's dtype as the reference rounds them. From compute
capability 9.0 on, a kernel is launched while the one before it still runs (programmatic dependent launch) and waits
where it first needs its results.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.sparse_mlp import ACTIVATIONS, check_arguments, sparse_mlp

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_SILU, _GELU, _GELU_TANH = (tl.constexpr(_CODES[name]) for name in ("silu", "gelu", "gelu_tanh"))

TOKENS = 16
"""Tokens are padded to this for the tensor cores."""


@triton.jit
def _activate(g, CODE: tl.constexpr):
    if CODE == _SILU:
        return g / (1.0 + tl.exp(-g))
    if CODE == _GELU:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if CODE == _GELU_TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        return 0.5 * g * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    return tl.where(g <= 0, 0.0, g)


@triton.jit
def _finish_gate(g, bias, rows, I, CODE: tl.constexpr, dtype: tl.constexpr):
    """act(g + bias), rounded where the reference rounds."""
    if bias is not None:
        g += tl.load(bias + rows, mask=rows < I, other=0.0).to(tl.float32)
    return _activate(g.to(dtype).to(tl.float32), CODE).to(dtype).to(tl.float32)


@triton.jit
def _append(list_n, count, rows, wanted):
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
def _gate(
    x, gate, bias, threshold, count, list_n, a_n, I, H,
    CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = gate + rows.to(tl.int64)[:, None] * H
    g = tl.zeros((ROWS, BLOCK), tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(
            at + k[None, :], mask=(rows < I)[:, None] & (k < H)[None, :], other=0.0, eviction_policy="evict_first"
        )
        g += w.to(tl.float32) * tl.load(x + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
    if PDL:
        gdc_launch_dependents()
    a = _finish_gate(tl.sum(g, 1), bias, rows, I, CODE, gate.dtype.element_ty)
    t = tl.load(threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    wanted = (rows < I) & ~(tl.abs(a) <= t)
    place = _append(list_n, count, rows, wanted)
    tl.store(a_n + place, a, mask=wanted)


@triton.jit
def _kept_rows(list_n, a_n, up, down, i, n, k, H):
    """The i-th neurons of the list, their activations, and their up and down rows; beyond its end all are zero."""
    row = tl.load(list_n + i, mask=i < n, other=0).to(tl.int64)
    a = tl.load(a_n + i, mask=i < n, other=0.0)
    at = row[:, None] * H + k[None, :]
    here = (i < n)[:, None] & (k < H)[None, :]
    w_up = tl.load(up + at, mask=here, other=0.0, eviction_policy="evict_first")
    w_down = tl.load(down + at, mask=here, other=0.0, eviction_policy="evict_first")
    return row, a, w_up, w_down


@triton.jit
def _up_down(
    x, up, down, bias, count, list_n, a_n, y, H, NEURONS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    inside = k < H
    dtype: tl.constexpr = up.dtype.element_ty
    first, step = tl.program_id(0) * NEURONS, tl.num_programs(0) * NEURONS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_k = tl.load(x + k, mask=inside, other=0.0)
    n = tl.load(count)
    total = tl.zeros((BLOCK,), tl.float32)
    row, a, w_up, w_down = _kept_rows(list_n, a_n, up, down, first + tl.arange(0, NEURONS), n, k, H)
    for start in range(first, n, step):
        i = start + tl.arange(0, NEURONS)
        # The next rows are on their way while these are multiplied.
        next_row, next_a, next_up, next_down = _kept_rows(list_n, a_n, up, down, i + step, n, k, H)
        u = tl.sum(w_up.to(tl.float32) * x_k.to(tl.float32)[None, :], 1)
        if bias is not None:
            u += tl.load(bias + row, mask=i < n, other=0.0).to(tl.float32)
        h = (a * u.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        total += tl.sum(h[:, None] * w_down.to(tl.float32), 0)
        row, a, w_up, w_down = next_row, next_a, next_up, next_down
    if first < n:
        tl.atomic_add(y + k, total, mask=inside, sem="relaxed")


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
    place = _append(list_n, count, rows, wanted)
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
    """Rows and columns a program of `_gate` takes at a time, and its warps."""
    return {"ROWS": 16, "BLOCK": 512 // itemsize, "num_warps": 4}


def up_down_config(hidden: int, itemsize: int) -> dict:
    """Neurons that a program of `_up_down` takes at a time, its columns (all), its warps, and programs at once."""
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
) -> Tensor:
    T, H = x_TH.shape
    I = gate_IH.shape[0]
    check_arguments(x_TH, gate_IH, up_IH, down_IH, threshold_I, gate_bias_I, up_bias_I, down_bias_H)
    tensors = (x_TH, gate_IH, up_IH, down_IH, threshold_I, gate_bias_I, up_bias_I)
    x, gate, up, down, threshold, gate_bias, up_bias = (None if t is None else t.contiguous() for t in tensors)
    code, itemsize, device = _CODES[activation], gate.element_size(), x.device
    y_TH = torch.empty(T, H, dtype=torch.float32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    list_n = torch.empty(I, dtype=torch.int32, device=device)
    pdl = _dependent_launch(device)
    launch = {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
    with torch.cuda.device(device):
        _clear[(triton.cdiv(T * H, 1024),)](y_TH, count, T * H, BLOCK=1024, **launch)
        if T == 1:
            a_n = torch.empty(I, dtype=torch.float32, device=device)
            config = gate_config(H, itemsize)
            grid = (triton.cdiv(I, config["ROWS"]),)
            _gate[grid](x, gate, gate_bias, threshold, count, list_n, a_n, I, H, CODE=code, **config, **launch)
            config = up_down_config(H, itemsize)
            grid = (_multiprocessors(device) * config.pop("per_multiprocessor"),)
            _up_down[grid](x, up, down, up_bias, count, list_n, a_n, y_TH, H, **config, **launch)
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
            splits = max(1, 4 * _multiprocessors(device) // columns)
            _down_tokens[(columns, splits)](h_nT, down, count, list_n, y_TH, T, H, SPLITS=splits, **config)
    return y_TH if down_bias_H is None else y_TH + down_bias_H


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
