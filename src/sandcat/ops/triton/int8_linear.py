"""CUDA kernels of `sandcat::int8_linear`, and of the int8 layers of a fused step. Shapes: T tokens, K columns.

A program of `int8_rows` takes a tile of rows and a slice of the columns. It writes its slice of x down as fixed-point
digits (see fixed_point.py), which are columns of a matrix that the matrix unit multiplies the weights with, as they
come from memory: not an instruction is spent on a single weight. Of several tokens `write_digits` has written them
before. Programs that share rows add their float32 sums to y as they end, so two runs may differ in the last bits; under
`torch.use_deterministic_algorithms` no more of them share rows than sums of any order allow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.int8_linear import check_arguments, int8_linear
from sandcat.ops.triton.primitives.blocks import ask_for, clear, clear_share, gated, which_of_three
from sandcat.ops.triton.primitives.fixed_point import digits, scale_of_all
from sandcat.ops.triton.primitives.launch import dependent_launch, multiprocessors, shared_memory

OPS, INT8_OPS = (), ("int8_linear",)
DIGITS = tl.constexpr(4)
"""Columns that a token has."""
COLUMNS = 16
"""Columns that the matrix unit takes at least; those without a token are zero."""


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
def _own_digits(
    x, gate, norm, eps, room, first, width, K,
    CODE: tl.constexpr, DTYPE: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Writes the digits of `width` numbers of x, from the first one on, into `room`, words [4, SLICE / 4]. What sums of
    them are to be multiplied with."""
    s = tl.arange(0, SLICE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x_s = _inputs(x, gate, norm, first + s, (s < width) & (first + s < K), CODE, DTYPE)
    factor = 1.0
    if norm is not None:
        i = tl.arange(0, PAD)
        x_i = tl.load(x + i, mask=i < K, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x_i * x_i) / K + eps)
    there, back = scale_of_all(x_s)
    d_s = digits(x_s * there)
    words = tl.arange(0, SLICE // 4)
    for digit in tl.static_range(DIGITS):
        word = ((d_s >> (8 * digit)) & 255) << (8 * tl.arange(0, 4))[None, :]
        tl.store(room + digit * (SLICE // 4) + words, tl.sum(word, 1))
    tl.debug_barrier()
    return factor * back


@triton.jit
def write_digits(
    x, x_stride, gate, norm, eps, room, back_t, zeros, n_zeros, K,
    CODE: tl.constexpr, DTYPE: tl.constexpr, ZEROS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The digits of a token's x, of act(gate) * x in DTYPE, or of x after an RMSNorm: rows 4 t to 4 t + 3 of `room`,
    bytes [4 T, K]; and what sums of them are to be multiplied with. For `zeros` see `clear_share`."""
    t, k = tl.program_id(0), tl.arange(0, PAD)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x += t * x_stride
    if gate is not None:
        gate += t * x_stride
    x_k = _inputs(x, gate, norm, k, k < K, CODE, DTYPE)
    factor = 1.0
    if norm is not None:
        h_k = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(h_k * h_k) / K + eps)
    there, back = scale_of_all(x_k)
    d_k = digits(x_k * there)
    room += t.to(tl.int64) * DIGITS * K
    for digit in tl.static_range(DIGITS):
        tl.store(room + digit * K + k, (d_k >> (8 * digit)).to(tl.int8), mask=k < K)
    tl.store(back_t + t, factor * back)
    clear_share(zeros, n_zeros, ZEROS)


@triton.jit
def int8_rows(
    x, gate, norm, eps, a, b, c, a_bias, b_bias, c_bias, a_scale, b_scale, c_scale, y, y_stride, zeros, n_zeros,
    position, room, back_t, A, B, C, K, T, PIECES, CODE: tl.constexpr, DTYPE: tl.constexpr, ADD: tl.constexpr,
    SHARED: tl.constexpr, ZEROS: tl.constexpr, PAD: tl.constexpr, SLICE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = the products of up to three matrices, of A, B and C rows, one after another, with x, with act(gate) * x in
    DTYPE, or with x after an RMSNorm. With ADD they are added to y; where programs are SHARED, by atomics.

    A program takes ROWS of them and PIECES times BLOCK columns, at most SLICE. For `zeros` see `clear_share`; with
    `position`, the last kernel of a step, the position goes on by one. With `back_t` the digits of T tokens, at most
    TOKENS, are in `room` (see `write_digits`); else it is room for those of the one token that x is.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    w, size, rows, before = which_of_three(tile, a, b, c, A, B, C, ROWS)
    first = split * PIECES * BLOCK
    k, n = tl.arange(0, BLOCK), tl.arange(0, TOKENS * DIGITS)
    w += rows.to(tl.int64)[:, None] * K + first
    if PDL:  # weights, which no step changes, are asked for before the kernel before this one ends
        lines = tl.arange(0, BLOCK // 128) * 128
        for p in tl.static_range(AHEAD):
            line = p * BLOCK + lines
            asked = (rows < size)[:, None] & ((first + line < K) & (p < PIECES))[None, :]
            ask_for(w + line[None, :], asked)
        gdc_wait()
    tokens = tl.arange(0, TOKENS)
    if back_t is None:
        room += (tile * tl.num_programs(1) + split) * SLICE
        back = _own_digits(x, gate, norm, eps, room, first, PIECES * BLOCK, K, CODE, DTYPE, SLICE, PAD)
        worth_t = tl.where(tokens == 0, back, 0.0)
        digit_n = room.to(tl.pointer_type(tl.int8)) + n[None, :] * SLICE
    else:
        digit_n = room + first + n.to(tl.int64)[None, :] * K
        worth_t = tl.load(back_t + tokens, mask=tokens < T, other=0.0)
    acc = tl.zeros((ROWS, TOKENS * DIGITS), tl.int32)
    for piece in tl.range(0, PIECES, num_stages=STAGES):
        at = piece * BLOCK + k
        here = (rows < size)[:, None] & (first + at < K)[None, :]
        w_rk = tl.load(w + at[None, :], mask=here, other=0, eviction_policy="evict_first")
        there = (n < T * DIGITS)[None, :]
        if back_t is not None:
            there &= (first + at < K)[:, None]
        d_kn = tl.load(digit_n + at[:, None], mask=there, other=0)
        acc = tl.dot(w_rk, d_kn, acc, out_dtype=tl.int32)
    if PDL:
        gdc_launch_dependents()
    clear_share(zeros, n_zeros, ZEROS)
    digit = tl.arange(0, DIGITS)
    worth = ((127 - 7 * digit) << 23).to(tl.float32, bitcast=True)
    total_td = tl.reshape(acc.to(tl.float32), (ROWS, TOKENS, DIGITS)) * worth[None, None, :]
    scale = which_of_three(tile, a_scale, b_scale, c_scale, A, B, C, ROWS)[0]
    bias = None
    if a_bias is not None:
        bias = which_of_three(tile, a_bias, b_bias, c_bias, A, B, C, ROWS)[0]
    factor = tl.load(scale + rows, mask=rows < size, other=0.0).to(tl.float32)
    total = tl.sum(total_td, 2) * worth_t[None, :] * factor[:, None]
    if a_bias is not None:
        total += tl.load(bias + rows, mask=(rows < size) & (split == 0), other=0.0).to(tl.float32)[:, None]
    out = y + tokens.to(tl.int64)[None, :] * y_stride + (before + rows)[:, None]
    here = (rows < size)[:, None] & (tokens < T)[None, :]
    if SHARED:
        tl.atomic_add(out, total, mask=here, sem="relaxed")
    else:
        if ADD:
            total += tl.load(out, mask=here, other=0.0)
        tl.store(out, total.to(y.dtype.element_ty), mask=here)
    if position is not None:
        tl.store(position, tl.load(position) + 1, mask=(tile == 0) & (split == 0))


def int8_rows_config(
    sizes: list[int], columns: int, device: torch.device, most: int, tokens: int = 1,
    *, rows: int | None = None, block: int | None = None, stages: int = 3, warps: int | None = None,
) -> tuple[dict, tuple[int, int]]:  # fmt: skip
    """Shape of a program of `int8_rows`, and the grid: tiles of rows and slices of columns, `most` of these at most.

    All programs run at once, as far as there are tiles enough: two a multiprocessor where its memory has the room. The
    defaults are those that were fastest (docs/performance.md): one token writes digits too, so it wants long tiles.
    """
    usual = (256, 128, 8) if tokens == 1 else (128, 256, 4)
    rows, block, warps = (given or own for given, own in zip((rows, block, warps), usual, strict=True))
    width = max(COLUMNS, DIGITS.value * triton.next_power_of_2(tokens))
    stages = min(stages, shared_memory(device) // ((rows + width) * block))
    places = max(1, shared_memory(device) // ((rows + width) * block * stages))
    tiles, pieces = sum(triton.cdiv(size, rows) for size in sizes), triton.cdiv(columns, block)
    slices = max(1, min(places * multiprocessors(device) // tiles, pieces, most))
    each = triton.cdiv(pieces, slices)
    config = {
        "PIECES": each,
        "PAD": triton.next_power_of_2(columns),
        "SLICE": triton.next_power_of_2(each * block),
        "TOKENS": width // DIGITS.value,
        "ROWS": rows,
        "BLOCK": block,
        "STAGES": stages,
        "AHEAD": 1,
        "num_warps": warps,
    }
    return config, (tiles, triton.cdiv(pieces, each))


def write_digits_config(columns: int) -> dict:
    """Columns that a program of `write_digits` takes (all), and its warps."""
    pad = triton.next_power_of_2(columns)
    return {"PAD": pad, "num_warps": max(4, min(32, pad // 512))}


@int8_linear.register_kernel("cuda")
def launch(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    check_arguments(x_TI, weight_OI, scale_O, bias_O)
    x, weight, scale = x_TI.contiguous(), weight_OI.contiguous(), scale_O.contiguous()
    bias = None if bias_O is None else bias_O.contiguous()
    (O, I), T, device = weight.shape, len(x), x.device
    y_TO = torch.empty(T, O, dtype=torch.float32, device=device)
    # two sums are the same in any order
    most = 2 if torch.are_deterministic_algorithms_enabled() else I
    config, grid = int8_rows_config([O], I, device, most, T)
    dependent = dependent_launch(device)
    with torch.cuda.device(device):
        if T == 1:
            room = torch.empty(grid[0] * grid[1] * config["SLICE"], dtype=torch.int32, device=device)
            back_t = None
            clear[(triton.cdiv(O, 1024),)](y_TO, None, O, BLOCK=1024, **dependent)
        else:
            room = torch.empty(T, DIGITS.value, I, dtype=torch.int8, device=device)
            back_t = torch.empty(T, dtype=torch.float32, device=device)
            write_digits[(T,)](
                x, I, None, None, 0.0, room, back_t, y_TO, T * O, I, CODE=0, DTYPE=tl.float32,
                ZEROS=triton.next_power_of_2(O), **write_digits_config(I), **dependent,
            )  # fmt: skip
        int8_rows[grid](
            x, None, None, 0.0, *[weight] * 3, *[bias] * 3, *[scale] * 3, y_TO, O, None, 0, None, room, back_t, O, 0, 0,
            I, T, CODE=0, DTYPE=tl.float32, ADD=False, SHARED=grid[1] > 1, ZEROS=1, **config, **dependent,
        )  # fmt: skip
    return y_TO
