"""CUDA kernels of `sandcat::sparse_mlp` for several tokens: the list of all neurons that any token keeps, with
tensor-core products for gate, up and down. Shapes: see ops/sparse_mlp.py; n listed neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sandcat.ops.triton.launch import multiprocessors
from sandcat.ops.triton.pieces import activated, append

TOKENS = 16
"""Tokens are padded to this for the tensor cores."""


@triton.jit
def gate_tokens(
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
    a = activated(g, gate.dtype.element_ty, CODE)
    limit = tl.load(threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    keep = ~(tl.abs(a) <= limit[:, None]) & (t < T)[None, :] & (rows < I)[:, None]
    keep_bits = tl.sum(keep.to(tl.int32) << t[None, :], 1)
    wanted = keep_bits != 0
    place = append(list_n, count, rows, wanted)
    tl.store(keep_n + place, keep_bits, mask=wanted)
    tl.store(a_nT + place[:, None] * TOKENS + t[None, :], a, mask=wanted[:, None])


@triton.jit
def up_tokens(
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
def down_tokens(
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


def rows_config(itemsize: int) -> dict:
    """Neurons and columns that `gate_tokens` and `up_tokens` multiply at a time."""
    return {"TOKENS": TOKENS, "ROWS": 16, "BLOCK": 512 // itemsize, "num_warps": 4}


def columns_config(itemsize: int) -> dict:
    """Neurons and columns that `down_tokens` multiplies at a time."""
    return {"TOKENS": TOKENS, "ROWS": 32, "BLOCK": 256 // itemsize, "num_warps": 4}


def add_tokens(
    x_TH: Tensor, gate_IH: Tensor, up_IH: Tensor, down_IH: Tensor, threshold_I: Tensor, gate_bias_I: Tensor | None,
    up_bias_I: Tensor | None, code: int, count: Tensor, list_n: Tensor, y_TH: Tensor,
) -> None:  # fmt: skip
    """y += the MLP of x; count is 0 before."""
    (T, H), I, device, itemsize = x_TH.shape, len(gate_IH), x_TH.device, gate_IH.element_size()
    a_nT = torch.empty(I, TOKENS, dtype=torch.float32, device=device)
    h_nT = torch.empty(I, TOKENS, dtype=gate_IH.dtype, device=device)
    keep_n = torch.empty_like(list_n)
    config = rows_config(itemsize)
    grid = (triton.cdiv(I, config["ROWS"]),)
    gate_tokens[grid](
        x_TH, gate_IH, gate_bias_I, threshold_I, count, list_n, a_nT, keep_n, T, I, H, CODE=code, **config
    )  # fmt: skip
    up_tokens[grid](x_TH, up_IH, up_bias_I, count, list_n, a_nT, keep_n, h_nT, T, H, **config)
    config = columns_config(itemsize)
    columns = triton.cdiv(H, config["BLOCK"])
    splits = max(1, 4 * multiprocessors(device) // columns)
    down_tokens[(columns, splits)](h_nT, down_IH, count, list_n, y_TH, T, H, SPLITS=splits, **config)
