"""CUDA kernels of `sandcat::stored_linear`, and of the layers of a fused step whose weights are codes. Shapes: T
tokens, K columns.

A program of `coded_rows` takes a tile of rows and a slice of the columns. It writes its slice of x down as a few
numbers in a type that the matrix unit multiplies codes with (`DIGITS`), which are columns of a matrix: as int8
fixed-point digits for int8 (see fixed_point.py), so that not an instruction is spent on a single weight; as float16,
and what that leaves, for e4m3, which float16 holds exactly. Of several tokens `write_digits` has written them before.
Programs that share rows add their float32 sums to y as they end, so two runs may differ in the last bits; under
`torch.use_deterministic_algorithms` no more of them share rows than sums of any order allow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.stored_linear import check_arguments, stored_linear
from sandcat.ops.triton.primitives.arguments import Source, Zeros, three, three_sizes
from sandcat.ops.triton.primitives.blocks import INT8, as_dtype, ask_for, clear, clear_share, gated, which_of_three
from sandcat.ops.triton.primitives.fixed_point import digits, scale_of_all
from sandcat.ops.triton.primitives.launch import code_of, codes, dependent_launch, multiprocessors, shared_memory
from sandcat.ops.weights import Stored

OPS = ("stored_linear",)
DIGITS = {"int8": 4, "fp8": 2}
"""Columns that a token has, by the format of the weights: their kind is that of `digits_dtype`."""
REST = tl.constexpr(2048.0)
"""How many times what float16 leaves of a number is written down."""
COLUMNS = {"int8": 16, "fp8": 8}
"""Columns that the matrix unit takes at least; those without a token are zero. With 16 of them e4m3 would be widened
for instructions of another kind, which take twice as many registers."""
SHAPES = {"int8": ((256, 128, 8), (128, 256, 4)), "fp8": ((256, 128, 8), (128, 128, 8))}
"""Rows, columns and warps of a program, for one token and for several."""


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
def digits_of(x, FORMAT: tl.constexpr):
    """The digits of numbers of at most 64, all in an int32, the first one lowest."""
    if FORMAT == INT8:
        bits = digits(x)
    else:
        first = x.to(tl.float16)
        rest = ((x - first.to(tl.float32)) * REST).to(tl.float16)
        low, high = first.to(tl.int16, bitcast=True).to(tl.int32), rest.to(tl.int16, bitcast=True).to(tl.int32)
        bits = (low & 0xFFFF) | (high << 16)
    return bits


@triton.jit
def _own_digits(
    source, room, first, width, K, FORMAT: tl.constexpr, DIGITS: tl.constexpr, CODE: tl.constexpr,
    DTYPE: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Writes the digits of `width` numbers of `Source`, from the first one on, into `room`, [DIGITS, SLICE], in whole
    words. What sums of them are to be multiplied with."""
    PER_WORD: tl.constexpr = DIGITS  # for both formats: four bytes, or two halves
    s = tl.arange(0, SLICE // PER_WORD)[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]
    here = (s < width) & (first + s < K)
    x_s = _inputs(source.x, source.gate, source.norm, first + s, here, CODE, DTYPE)
    factor = 1.0
    if source.norm is not None:
        i = tl.arange(0, PAD)
        x_i = tl.load(source.x + i, mask=i < K, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x_i * x_i) / K + source.eps)
    there, back = scale_of_all(x_s)
    bits = digits_of(x_s * there, FORMAT)
    WIDTH: tl.constexpr = 32 // PER_WORD
    words = tl.arange(0, SLICE // PER_WORD)
    for digit in tl.static_range(DIGITS):
        word = ((bits >> (WIDTH * digit)) & ((1 << WIDTH) - 1)) << (WIDTH * tl.arange(0, PER_WORD))[None, :]
        tl.store(room + digit * (SLICE // PER_WORD) + words, tl.sum(word, 1))
    tl.debug_barrier()
    return factor * back


@triton.jit
def write_digits(
    x, x_stride, gate, room, back_t, zeros, K, FORMAT: tl.constexpr, DIGITS: tl.constexpr, CODE: tl.constexpr,
    DTYPE: tl.constexpr, ZEROS: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The digits of a token's x, or of act(gate) * x in DTYPE, for weights of the FORMAT: rows DIGITS t and so on of
    `room`, [DIGITS T, K]; and what sums of them are to be multiplied with. For `zeros` see `clear_share`."""
    t, k = tl.program_id(0), tl.arange(0, PAD)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x += t * x_stride
    if gate is not None:
        gate += t * x_stride
    x_k = _inputs(x, gate, None, k, k < K, CODE, DTYPE)
    there, back = scale_of_all(x_k)
    bits = digits_of(x_k * there, FORMAT)
    room += t.to(tl.int64) * DIGITS * K
    for digit in tl.static_range(DIGITS):
        if FORMAT == INT8:
            d_k = (bits >> (8 * digit)).to(tl.int8)
        else:
            d_k = (bits >> (16 * digit)).to(tl.int16).to(tl.float16, bitcast=True)
        tl.store(room + digit * K + k, d_k, mask=k < K)
    tl.store(back_t + t, back)
    clear_share(zeros, ZEROS)


@triton.jit
def coded_rows(
    source, weights, biases, scales, sizes, y, y_stride, zeros, position, room, back_t, K, T, PIECES,
    FORMAT: tl.constexpr, DIGITS: tl.constexpr, CODE: tl.constexpr, DTYPE: tl.constexpr, ADD: tl.constexpr,
    SHARED: tl.constexpr, ZEROS: tl.constexpr, PAD: tl.constexpr, SLICE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = the products of up to three matrices, of so many rows, one after another, with `Source`, in DTYPE where that
    is act(gate) * x. With ADD they are added to y; where programs are SHARED, by atomics.

    A program takes ROWS of them and PIECES times BLOCK columns, at most SLICE. For `zeros` see `clear_share`; with
    `position`, the last kernel of a step, the position goes on by one. With `back_t` the digits of T tokens, at most
    TOKENS, are in `room` (see `write_digits`), and the source is None; else it is room for those of the one token.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    w, size, rows, before = which_of_three(tile, weights, sizes, ROWS)
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
        back = _own_digits(source, room, first, PIECES * BLOCK, K, FORMAT, DIGITS, CODE, DTYPE, SLICE, PAD)
        worth_t = tl.where(tokens == 0, back, 0.0)
        kind: tl.constexpr = tl.int8 if FORMAT == INT8 else tl.float16
        digit_n = room.to(tl.pointer_type(kind)) + n[None, :] * SLICE
    else:
        digit_n = room + first + n.to(tl.int64)[None, :] * K
        worth_t = tl.load(back_t + tokens, mask=tokens < T, other=0.0)
    acc = tl.zeros((ROWS, TOKENS * DIGITS), tl.int32 if FORMAT == INT8 else tl.float32)
    for piece in tl.range(0, PIECES, num_stages=STAGES):
        at = piece * BLOCK + k
        here = (rows < size)[:, None] & (first + at < K)[None, :]
        w_rk = tl.load(w + at[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        there = (n < T * DIGITS)[None, :]
        if back_t is not None:
            there &= (first + at < K)[:, None]
        d_kn = tl.load(digit_n + at[:, None], mask=there, other=0)
        if FORMAT == INT8:
            acc = tl.dot(w_rk, d_kn, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(as_dtype(w_rk, tl.float16, FORMAT), d_kn, acc, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    clear_share(zeros, ZEROS)
    BITS: tl.constexpr = 7 if FORMAT == INT8 else 11
    digit = tl.arange(0, DIGITS)
    worth = ((127 - BITS * digit) << 23).to(tl.float32, bitcast=True)
    total_td = tl.reshape(acc.to(tl.float32), (ROWS, TOKENS, DIGITS)) * worth[None, None, :]
    scale, bias = which_of_three(tile, scales, sizes, ROWS)[0], None
    if biases[0] is not None:
        bias = which_of_three(tile, biases, sizes, ROWS)[0]
    factor = tl.load(scale + rows, mask=rows < size, other=0.0).to(tl.float32)
    total = tl.sum(total_td, 2) * worth_t[None, :] * factor[:, None]
    if biases[0] is not None:
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


def coded_rows_config(
    format: str, sizes: list[int], columns: int, device: torch.device, most: int, tokens: int = 1,
    *, rows: int | None = None, block: int | None = None, stages: int = 3, warps: int | None = None,
) -> tuple[dict, tuple[int, int]]:  # fmt: skip
    """Shape of a program of `coded_rows`, and the grid: tiles of rows and slices of columns, `most` of these at most.

    All programs run at once, as far as there are tiles enough: two a multiprocessor where its memory has the room. The
    defaults are those that were fastest for int8 (docs/performance.md): one token writes digits too, so it wants long
    tiles. Those for fp8 are the nearest ones whose registers let as many programs run.
    """
    usual = SHAPES[format][tokens > 1]
    rows, block, warps = (given or own for given, own in zip((rows, block, warps), usual, strict=True))
    width, digit = max(COLUMNS[format], DIGITS[format] * triton.next_power_of_2(tokens)), digits_dtype(format).itemsize
    stages = min(stages, shared_memory(device) // ((rows + digit * width) * block))
    places = max(1, shared_memory(device) // ((rows + digit * width) * block * stages))
    tiles, pieces = sum(triton.cdiv(size, rows) for size in sizes), triton.cdiv(columns, block)
    slices = max(1, min(places * multiprocessors(device) // tiles, pieces, most))
    each = triton.cdiv(pieces, slices)
    config = {
        "FORMAT": code_of(format),
        "DIGITS": DIGITS[format],
        "PIECES": each,
        "PAD": triton.next_power_of_2(columns),
        "SLICE": triton.next_power_of_2(each * block),
        "TOKENS": width // DIGITS[format],
        "ROWS": rows,
        "BLOCK": block,
        "STAGES": stages,
        "AHEAD": 1,
        "num_warps": warps,
    }
    return config, (tiles, triton.cdiv(pieces, each))


def digits_dtype(format: str) -> torch.dtype:
    """Of the digits of x that weights of a format are multiplied with."""
    return torch.int8 if format == "int8" else torch.float16


def write_digits_config(format: str, columns: int) -> dict:
    """Columns that a program of `write_digits` takes (all), and its warps."""
    pad = triton.next_power_of_2(columns)
    return {"FORMAT": code_of(format), "DIGITS": DIGITS[format], "PAD": pad, "num_warps": max(4, min(32, pad // 512))}


@stored_linear.register_kernel("cuda")
def launch(x_TI: Tensor, weight: Stored) -> Tensor:
    """The op on a GPU; see ops/stored_linear.py."""
    check_arguments(x_TI, weight)
    assert weight.scale is not None
    x, rows, scale, format = x_TI.contiguous(), codes(weight).contiguous(), weight.scale.contiguous(), weight.format
    bias = None if weight.bias is None else weight.bias.contiguous()
    (O, I), T, device = rows.shape, len(x), x.device
    y_TO = torch.empty(T, O, dtype=torch.float32, device=device)
    # two sums are the same in any order
    most = 2 if torch.are_deterministic_algorithms_enabled() else I
    config, grid = coded_rows_config(format, [O], I, device, most, T)
    dependent = dependent_launch(device)
    with torch.cuda.device(device):
        if T == 1:
            room = torch.empty(grid[0] * grid[1] * config["SLICE"], dtype=torch.int32, device=device)
            back_t = None
            clear[(triton.cdiv(O, 1024),)](y_TO, None, O, BLOCK=1024, **dependent)
        else:
            room = torch.empty(T, DIGITS[format], I, dtype=digits_dtype(format), device=device)
            back_t = torch.empty(T, dtype=torch.float32, device=device)
            write_digits[(T,)](
                x, I, None, room, back_t, Zeros(y_TO, T * O), I, CODE=0, DTYPE=tl.float32,
                ZEROS=triton.next_power_of_2(O), **write_digits_config(format, I), **dependent,
            )  # fmt: skip
        coded_rows[grid](
            Source(x) if T == 1 else None, three([rows]), three([bias]), three([scale]), three_sizes([O]), y_TO, O,
            Zeros(), None, room, back_t, I, T, CODE=0, DTYPE=tl.float32, ADD=False, SHARED=grid[1] > 1, ZEROS=1,
            **config, **dependent,
        )  # fmt: skip
    return y_TO
