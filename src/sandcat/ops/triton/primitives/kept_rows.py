"""What `sparse_rows` is made of: its input, the list of the channels that it keeps, and sums of the rows of a list."""

from __future__ import annotations

import triton
import triton.language as tl

from sandcat.ops.triton.primitives.blocks import INT8, gated, let_in, widen
from sandcat.ops.triton.primitives.fixed_point import add_four_halves, add_four_rows, digits, scale_of_all


@triton.jit
def attended(x, heads, i, K, PARTS: tl.constexpr):
    """Some elements of what `Heads` attend to, from the parts x that `attend` leaves."""
    part = i // heads.size * PARTS
    highest = tl.load(heads.top + part, mask=i < K, other=0.0)
    for p in tl.static_range(1, PARTS):
        highest = tl.maximum(highest, tl.load(heads.top + part + p, mask=i < K, other=0.0))
    x_i, weights = tl.zeros_like(highest), tl.zeros_like(highest)
    for p in tl.static_range(PARTS):
        fade = tl.exp(tl.load(heads.top + part + p, mask=i < K, other=0.0) - highest)
        weights += fade * tl.load(heads.sum + part + p, mask=i < K, other=1.0)
        x_i += fade * tl.load(x + (part + p) * heads.size + i % heads.size, mask=i < K, other=0.0)
    return x_i / weights


@triton.jit
def split_of_x(
    source, norm_i, heads, i, K, dtype: tl.constexpr, CODE: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Some elements of a layer's input: of `Source`, or of parts of what `Heads` attend to. Rounded as transformers
    rounds it."""
    if PARTS:
        return attended(source.x, heads, i, K, PARTS).to(dtype).to(tl.float32)
    x_i = tl.load(source.x + i, mask=i < K, other=0.0).to(tl.float32)
    if source.gate is not None:
        g_i = tl.load(source.gate + i, mask=i < K, other=0.0).to(tl.float32)
        x_i = gated(g_i, x_i.to(dtype).to(tl.float32), dtype, CODE)
    if source.norm is not None:
        k = tl.arange(0, PAD)
        x_k = tl.load(source.x + k, mask=k < K, other=0.0).to(tl.float32)
        x_i = (x_i * tl.rsqrt(tl.sum(x_k * x_k) / K + source.eps)).to(dtype).to(tl.float32)
        x_i = (x_i * norm_i).to(dtype).to(tl.float32)
    return x_i


@triton.jit
def list_words(list_i, list_x, i, x_i, keep, e, FORMAT: tl.constexpr):
    """Lists all channels, with four words of x for every four: int8's are three of digits and one unused, e4m3's each x
    as float16, twice. Those that are not kept come last, as noughts, because four are multiplied at once. How many are
    kept, and what sums are to be multiplied with."""
    kept, n = tl.cumsum(keep.to(tl.int32)), tl.sum(keep.to(tl.int32))
    place = tl.where(keep, kept - 1, n + e - kept)
    x_i = tl.where(keep, x_i, 0.0)
    there, back = scale_of_all(x_i)
    tl.store(list_i + place, i)
    if FORMAT == INT8:
        d_i = digits(x_i * there)
        at = list_x.to(tl.pointer_type(tl.int8)) + place // 4 * 16 + place % 4
        for digit in tl.static_range(3):
            tl.store(at + digit * 4, (d_i >> (8 * digit)).to(tl.int8))
    else:  # of at most 16, so that four products with e4m3 are within its range
        half = (x_i * (there * 0.25)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        tl.store(list_x.to(tl.pointer_type(tl.int32)) + place, half | (half << 16))
        back *= 4.0
    tl.debug_barrier()
    return n, back


@triton.jit
def word_sums(
    list_i, list_x, n, w, size, cols, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, LET_IN: tl.constexpr,
):  # fmt: skip
    """The sums of n listed rows of codes, times what `list_words` has written. For LET_IN see `let_in`."""
    tl.static_assert(ROWS == 4)
    words, r = list_x.to(tl.pointer_type(tl.int32)), tl.arange(0, 4)
    none, acc = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    y0, y1, y2 = none, none, none
    for start in tl.range(0, n, 4, num_stages=STAGES):
        row = tl.load(list_i + start + r).to(tl.int64)
        here = (start + r < n)[:, None] & (cols < size)[None, :]
        w_rc = tl.load(w + row[:, None] * size + cols[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        d_r = tl.load(words + start + r)
        w0, w1, w2, w3 = _four_rows(w_rc, BLOCK)
        d_02, d_13 = tl.split(tl.reshape(d_r, (2, 2)))
        d0, d2 = tl.split(d_02)
        d1, d3 = tl.split(d_13)
        if FORMAT == INT8:
            y0, y1, y2 = add_four_rows(w0, w1, w2, w3, d0 + none, d1 + none, d2 + none, y0, y1, y2)
        else:
            acc = add_four_halves(w0, w1, w2, w3, d0 + none, d1 + none, d2 + none, d3 + none, acc)
        if LET_IN:
            let_in(start, n)
    if FORMAT == INT8:
        acc = y0.to(tl.float32) + (y1.to(tl.float32) + y2.to(tl.float32) * 2.0**-7) * 2.0**-7
    return acc


@triton.jit
def _four_rows(w_rc, BLOCK: tl.constexpr):
    """Four rows, each by itself; a thread has the same columns of all."""
    w_01, w_23 = tl.split(tl.permute(tl.reshape(w_rc, (2, 2, BLOCK)), (2, 1, 0)))
    w0, w1 = tl.split(w_01)
    w2, w3 = tl.split(w_23)
    return w0, w1, w2, w3


@triton.jit
def add_four(acc, w_rc, x_r, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """acc + the products of four rows of codes with four numbers: a sum of the four alone would take one addition
    more."""
    w0, w1, w2, w3 = _four_rows(w_rc, BLOCK)
    x_02, x_13 = tl.split(tl.reshape(x_r, (2, 2)))
    x0, x2 = tl.split(x_02)
    x1, x3 = tl.split(x_13)
    acc = tl.fma(widen(w0, FORMAT), x0, acc)
    acc = tl.fma(widen(w1, FORMAT), x1, acc)
    acc = tl.fma(widen(w2, FORMAT), x2, acc)
    return tl.fma(widen(w3, FORMAT), x3, acc)
