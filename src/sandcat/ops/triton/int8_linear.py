"""CUDA kernel of `sandcat::int8_linear` for one token, and of the int8 layers of a fused step.

A program takes a tile of rows and a slice of the columns. It writes its slice of x down as fixed-point digits (see
fixed_point.py), which are columns of a matrix that the matrix unit multiplies the weights with, as they come from
memory: not an instruction is spent on a single weight. Programs that share rows add their float32 sums to y as they
end, so two runs may differ in the last bits; under `torch.use_deterministic_algorithms` no more of them share rows than
sums of any order allow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.int8_linear import check_arguments, int8_linear, reference
from sandcat.ops.triton.fixed_point import digits, scale_of_all
from sandcat.ops.triton.launch import dependent_launch, multiprocessors, shared_memory
from sandcat.ops.triton.pieces import ask_for, clear, clear_share, finish, gated, which_of_three

OPS, INT8_OPS = (), ("int8_linear",)
COLUMNS = tl.constexpr(16)
"""Columns that the matrix unit takes at least; four are digits, the others are zero."""


@triton.jit
def _inputs(x, gate, norm, k, here, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """x, act(gate) * x in DTYPE, or x times the weight of a norm, whose other factor belongs to all sums."""
    x_k = tl.load(x + k, mask=here, other=0.0).to(tl.float32)
    if gate is not None:
        g_k = tl.load(gate + k, mask=here, other=0.0).to(tl.float32)
        x_k = gated(g_k, x_k.to(DTYPE).to(tl.float32), DTYPE, CODE)
    if norm is not None:
        x_k *= tl.load(norm + k, mask=here, other=0.0).to(tl.float32)
    return x_k


@triton.jit
def int8_rows(
    x, gate, norm, eps, a, b, c, a_bias, b_bias, c_bias, a_scale, b_scale, c_scale, y, zeros, n_zeros, position, room,
    A, B, C, K, PIECES, CODE: tl.constexpr, DTYPE: tl.constexpr, ADD: tl.constexpr, SHARED: tl.constexpr,
    ZEROS: tl.constexpr, PAD: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = the products of up to three matrices, of A, B and C rows, one after another, with x, with act(gate) * x in
    DTYPE, or with x after an RMSNorm. With ADD they are added to y; where programs are SHARED, by atomics.

    A program takes ROWS of them and PIECES times BLOCK columns, at most SLICE. For `zeros` see `clear_share`; with
    `position`, the last kernel of a step, the position goes on by one.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    w, size, rows, before = which_of_three(tile, a, b, c, A, B, C, ROWS)
    first = split * PIECES * BLOCK
    k, n = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    w += rows.to(tl.int64)[:, None] * K + first
    if PDL:  # weights, which no step changes, are asked for before the kernel before this one ends
        lines = tl.arange(0, BLOCK // 128) * 128
        for p in tl.static_range(AHEAD):
            line = p * BLOCK + lines
            asked = (rows < size)[:, None] & ((first + line < K) & (p < PIECES))[None, :]
            ask_for(w + line[None, :], asked)
        gdc_wait()
    s = tl.arange(0, SLICE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x_s = _inputs(x, gate, norm, first + s, (s < PIECES * BLOCK) & (first + s < K), CODE, DTYPE)
    factor = 1.0
    if norm is not None:
        i = tl.arange(0, PAD)
        x_i = tl.load(x + i, mask=i < K, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x_i * x_i) / K + eps)
    there, back = scale_of_all(x_s)
    d_s = digits(x_s * there)
    room += (tile * tl.num_programs(1) + split) * SLICE
    words = tl.arange(0, SLICE // 4)
    for digit in tl.static_range(4):
        word = ((d_s >> (8 * digit)) & 255) << (8 * tl.arange(0, 4))[None, :]
        tl.store(room + digit * (SLICE // 4) + words, tl.sum(word, 1))
    tl.debug_barrier()
    acc = tl.zeros((ROWS, COLUMNS), tl.int32)
    digit_n = room.to(tl.pointer_type(tl.int8)) + n[None, :] * SLICE
    for piece in tl.range(0, PIECES, num_stages=STAGES):
        at = piece * BLOCK + k
        here = (rows < size)[:, None] & (first + at < K)[None, :]
        w_rk = tl.load(w + at[None, :], mask=here, other=0, eviction_policy="evict_first")
        d_kn = tl.load(digit_n + at[:, None], mask=(n < 4)[None, :], other=0)
        acc = tl.dot(w_rk, d_kn, acc, out_dtype=tl.int32)
    if PDL:
        gdc_launch_dependents()
    clear_share(zeros, n_zeros, ZEROS)
    worth = tl.where(n < 4, ((127 - 7 * n) << 23).to(tl.float32, bitcast=True), 0.0)
    total = tl.sum(acc.to(tl.float32) * worth[None, :], 1) * (factor * back)
    scale = which_of_three(tile, a_scale, b_scale, c_scale, A, B, C, ROWS)[0]
    total = finish(total, scale, None, rows, size)
    if a_bias is not None:
        bias = which_of_three(tile, a_bias, b_bias, c_bias, A, B, C, ROWS)[0]
        total += tl.load(bias + rows, mask=(rows < size) & (split == 0), other=0.0).to(tl.float32)
    out = y + before + rows
    if SHARED:
        tl.atomic_add(out, total, mask=rows < size, sem="relaxed")
    else:
        if ADD:
            total += tl.load(out, mask=rows < size, other=0.0)
        tl.store(out, total.to(y.dtype.element_ty), mask=rows < size)
    if position is not None:
        tl.store(position, tl.load(position) + 1, mask=(tile == 0) & (split == 0))


def int8_rows_config(
    sizes: list[int], columns: int, device: torch.device, most: int,
    *, rows: int = 256, block: int = 128, stages: int = 3, warps: int = 8,
) -> tuple[dict, tuple[int, int]]:  # fmt: skip
    """Shape of a program of `int8_rows`, and the grid: tiles of rows and slices of columns, `most` of these at most.

    All programs run at once, as far as there are tiles enough: two a multiprocessor where its memory has the room.
    """
    stages = min(stages, shared_memory(device) // ((rows + COLUMNS.value) * block))
    places = max(1, shared_memory(device) // ((rows + COLUMNS.value) * block * stages))
    tiles, pieces = sum(triton.cdiv(size, rows) for size in sizes), triton.cdiv(columns, block)
    slices = max(1, min(places * multiprocessors(device) // tiles, pieces, most))
    each = triton.cdiv(pieces, slices)
    config = {
        "PIECES": each,
        "PAD": triton.next_power_of_2(columns),
        "SLICE": triton.next_power_of_2(each * block),
        "ROWS": rows,
        "BLOCK": block,
        "STAGES": stages,
        "AHEAD": 1,
        "num_warps": warps,
    }
    return config, (tiles, triton.cdiv(pieces, each))


@int8_linear.register_kernel("cuda")
def launch(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    check_arguments(x_TI, weight_OI, scale_O, bias_O)
    if len(x_TI) > 1:
        return reference(x_TI, weight_OI, scale_O, bias_O)
    x, weight, scale = x_TI.contiguous(), weight_OI.contiguous(), scale_O.contiguous()
    bias = None if bias_O is None else bias_O.contiguous()
    O, I = weight.shape
    y_TO = torch.empty(1, O, dtype=torch.float32, device=x.device)
    # two sums are the same in any order
    config, grid = int8_rows_config([O], I, x.device, 2 if torch.are_deterministic_algorithms_enabled() else I)
    room = torch.empty(grid[0] * grid[1] * config["SLICE"], dtype=torch.int32, device=x.device)
    dependent = dependent_launch(x.device)
    with torch.cuda.device(x.device):
        clear[(triton.cdiv(O, 1024),)](y_TO, None, O, BLOCK=1024, **dependent)
        int8_rows[grid](
            x, None, None, 0.0, *[weight] * 3, *[bias] * 3, *[scale] * 3, y_TO, None, 0, None, room, O, 0, 0, I, CODE=0,
            DTYPE=tl.float32, ADD=False, SHARED=grid[1] > 1, ZEROS=1, **config, **dependent,
        )  # fmt: skip
    return y_TO
