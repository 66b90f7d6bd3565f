"""CUDA kernel of `sandcat::int8_linear` for one token, and of the int8 layers of a fused step.

Programs that stay: each reads its rows piece by piece in one stream, in which the next pieces are asked for while this
one is multiplied. Int8 weights take more instructions a byte than others, so what whole rows need beside them (sums
over threads, a step of waiting a row) weighs more here than a vector x that is read again for every few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.int8_linear import check_arguments, int8_linear, reference
from sandcat.ops.triton.launch import multiprocessors
from sandcat.ops.triton.pieces import ask_for, clear_share, finish, widen

OPS, INT8_OPS = (), ("int8_linear",)


@triton.jit
def _select(tile, a, b, c, tiles_a, tiles_ab):
    """The one of three that a tile belongs to; without branches, which a stream of loads cannot have."""
    return tl.where(tile >= tiles_ab, c, tl.where(tile >= tiles_a, b, a))


@triton.jit
def int8_rows(
    x, norm, eps, a, b, c, a_bias, b_bias, c_bias, a_scale, b_scale, c_scale, y, zeros, n_zeros, position, A, B, C, K,
    ADD: tl.constexpr, ZEROS: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = (with ADD: y +=) the products of up to three matrices, of A, B and C rows, one after another, with x, or with
    x after an RMSNorm, which is a number that sums are multiplied with.

    For `zeros` see `clear_share`; with `position`, the last kernel of a step, the position goes on by one.
    """
    first, step = tl.program_id(0), tl.num_programs(0)
    k, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    tiles_a, tiles_ab = tl.cdiv(A, ROWS), tl.cdiv(A, ROWS) + tl.cdiv(B, ROWS)
    tiles, pieces = tiles_ab + tl.cdiv(C, ROWS), tl.cdiv(K, BLOCK)
    if PDL:  # weights, which no step changes, are asked for before the kernel before this one ends
        lines = tl.arange(0, BLOCK // 128) * 128
        for p in tl.static_range(AHEAD):
            tile_ahead = first + p // pieces * step
            rows_ahead = (tile_ahead - _select(tile_ahead, 0, tiles_a, tiles_ab, tiles_a, tiles_ab)) * ROWS + r
            size_ahead, k_ahead = _select(tile_ahead, A, B, C, tiles_a, tiles_ab), p % pieces * BLOCK + lines
            here = (rows_ahead < size_ahead)[:, None] & (k_ahead < K)[None, :] & (tile_ahead < tiles)
            w_ahead = _select(tile_ahead, a, b, c, tiles_a, tiles_ab)
            ask_for(w_ahead + rows_ahead.to(tl.int64)[:, None] * K + k_ahead[None, :], here)
        gdc_wait()
    factor = 1.0
    if norm is not None:
        i = tl.arange(0, PAD)
        x_i = tl.load(x + i, mask=i < K, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x_i * x_i) / K + eps)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for piece in tl.range(0, tl.cdiv(tl.maximum(tiles - first, 0), step) * pieces, num_stages=STAGES):
        tile = first + piece // pieces * step
        rows = (tile - _select(tile, 0, tiles_a, tiles_ab, tiles_a, tiles_ab)) * ROWS + r
        size, at = _select(tile, A, B, C, tiles_a, tiles_ab), piece % pieces * BLOCK + k
        w = _select(tile, a, b, c, tiles_a, tiles_ab) + rows.to(tl.int64)[:, None] * K + at[None, :]
        w_rk = tl.load(w, mask=(rows < size)[:, None] & (at < K)[None, :], other=0, eviction_policy="evict_first")
        x_k = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        if norm is not None:
            x_k *= tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
        acc += widen(w_rk) * x_k[None, :]
        if piece % pieces == pieces - 1:
            scale, bias = _select(tile, a_scale, b_scale, c_scale, tiles_a, tiles_ab), a_bias
            if a_bias is not None:
                bias = _select(tile, a_bias, b_bias, c_bias, tiles_a, tiles_ab)
            total = finish(tl.sum(acc, 1) * factor, scale, bias, rows, size)
            out = y + _select(tile, 0, A, A + B, tiles_a, tiles_ab) + rows
            if ADD:
                total += tl.load(out, mask=rows < size, other=0.0)
            tl.store(out, total.to(y.dtype.element_ty), mask=rows < size)
            acc = tl.zeros((ROWS, BLOCK), tl.float32)
    if PDL:
        gdc_launch_dependents()
    clear_share(zeros, n_zeros, ZEROS)
    if position is not None:
        tl.store(position, tl.load(position) + 1, mask=first == 0)


def int8_rows_config(rows: int, columns: int, multiprocessors: int) -> tuple[dict, int]:
    """Shape of a program of `int8_rows` and how many there are, for so many rows in all."""
    many = rows >= 16 * 3 * multiprocessors
    config = {"ROWS": 16, "STAGES": 4, "AHEAD": 4} if many else {"ROWS": 8, "STAGES": 5, "AHEAD": 4}
    config |= {"BLOCK": 512, "PAD": triton.next_power_of_2(columns), "num_warps": 4}
    return config, (3 if many else 4) * multiprocessors


@int8_linear.register_kernel("cuda")
def launch(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    check_arguments(x_TI, weight_OI, scale_O, bias_O)
    if len(x_TI) > 1:
        return reference(x_TI, weight_OI, scale_O, bias_O)
    x, weight, scale = x_TI.contiguous(), weight_OI.contiguous(), scale_O.contiguous()
    bias = None if bias_O is None else bias_O.contiguous()
    O, I = weight.shape
    y_TO = torch.empty(1, O, dtype=torch.float32, device=x.device)
    config, programs = int8_rows_config(O, I, multiprocessors(x.device))
    with torch.cuda.device(x.device):  # not a dependent launch: it would ask for weights that may not be written yet
        int8_rows[(programs,)](
            x, None, 0.0, *[weight] * 3, *[bias] * 3, *[scale] * 3, y_TO, None, 0, None, O, 0, 0, I, ADD=False, ZEROS=1,
            PDL=False, **config,
        )  # fmt: skip
    return y_TO
