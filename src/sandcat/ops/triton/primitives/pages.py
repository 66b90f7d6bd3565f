"""What CUDA kernels that read pages are made of: where keys and values lie, what is shared among programs, and sums of
weighted values.

Shapes: see ops/paged_attention.py; G query heads a key-value head. An item is some rows of one sequence and what one
key-value head has cached for them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sandcat.ops.triton.primitives.blocks import ask_for

UNIT, LEAST = tl.constexpr(16), tl.constexpr(4)
"""Keys that programs' parts are made of, and how many such units the smallest part has: more parts take longer to join
than they save."""


class Cached(NamedTuple):
    """What is cached, as `Pages` has it; addresses, and how many numbers things lie apart. (No field may be called
    `values`: a tuple of Triton's has that name for itself.)"""

    k: Tensor
    v: Tensor
    key_chunks: Tensor | None
    """int64: how far after the first chunk each chunk of the pool begins; None where there is one."""
    value_chunks: Tensor | None
    table: Tensor
    shift: Tensor | None
    start: Tensor
    length: Tensor
    key_page: int
    key_token: int
    key_head: int
    value_page: int
    value_token: int
    value_head: int
    table_b: int
    table_n: int
    table_m: int
    shift_b: int
    shift_n: int
    shift_m: int
    start_b: int
    start_n: int
    length_b: int
    length_n: int


class Turn(NamedTuple):
    """How q is turned, and normed before; None where it comes turned, or has no norm."""

    position: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


class New(NamedTuple):
    """The rows' own keys and values, which are turned as q is, and written; None where that is done."""

    k: Tensor | None = None
    v: Tensor | None = None
    k_row: int = 0
    v_row: int = 0


class Room(NamedTuple):
    """The parts of sums: of each row and query head their maximum, sum and weighted values; how many of an item's parts
    are there, which is 0 before and after each launch."""

    top: Tensor
    sum: Tensor
    acc: Tensor
    arrived: Tensor


@triton.jit
def span_of(
    item, here, first, cached, WINDOW, N: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, NEW: tl.constexpr
):
    """Of items: sequence, head, first row, how many rows, the index of the first row's own key, the first key that any
    row sees and the end of what they see; with NEW, of what has been written."""
    b, n = item // (N * BLOCKS), item // BLOCKS % N
    end_row = tl.load(first + b + 1, mask=here, other=0)
    row = tl.load(first + b, mask=here, other=0) + item % BLOCKS * ROWS
    rows = tl.maximum(0, tl.minimum(end_row - row, ROWS))
    length = tl.load(cached.length + b * cached.length_b + n * cached.length_n, mask=here, other=0)
    own = length if NEW else length - (end_row - row)
    low = tl.maximum(tl.load(cached.start + b * cached.start_b + n * cached.start_n, mask=here, other=0), 0)
    if WINDOW is not None:
        low = tl.maximum(low, own + 1 - WINDOW)
    return b, n, row, rows, own, low, tl.maximum(low, own if NEW else own + rows)


@triton.jit
def units_of(rows, low, high):
    """Units of keys that an item has; one where its rows see none, for somebody to say so."""
    return tl.where(rows > 0, tl.maximum(tl.cdiv(high - low, UNIT), 1), 0)


@triton.jit
def angles_of(position, turn, d, D: tl.constexpr):
    """Cosines and sines at positions: one, or a column of them."""
    at = position * D + d
    cos_md = tl.load(turn.cos + at, mask=d < D, other=0.0).to(tl.float32)
    return cos_md, tl.load(turn.sin + at, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def angles_of_rows(
    row, rows, shift, turn, d, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    """Those of an item's rows, for keys that are moved on by `shift`."""
    if ROWS == 1:
        position = tl.load(turn.position + row, mask=rows > 0, other=0) - shift
    else:
        r = tl.arange(0, GROUP)[:, None] // G
        position = tl.maximum(tl.load(turn.position + row + r, mask=r < rows, other=0) - shift, 0)
    return angles_of(position, turn, d, D)


@triton.jit
def places_of(b, n, entry, slot, seen, cached, P: tl.constexpr, ONE: tl.constexpr):
    """Where a head's keys and values lie, of tokens in slots of the pages that entries of the table name; ONE entry, or
    one for each token."""
    at = cached.table + b * cached.table_b + n * cached.table_n + entry * cached.table_m
    page = tl.load(at) if ONE else tl.load(at, mask=seen, other=0)
    key_at, value_at = n * cached.key_head + slot * cached.key_token, n * cached.value_head + slot * cached.value_token
    if cached.key_chunks is not None:
        key_at += tl.multiple_of(tl.load(cached.key_chunks + page // P), 16)
        value_at += tl.multiple_of(tl.load(cached.value_chunks + page // P), 16)
        page %= P
    return key_at + page.to(tl.int64) * cached.key_page, value_at + page.to(tl.int64) * cached.value_page


@triton.jit
def keys_of(
    j, low, high, b, n, cached, S: tl.constexpr, P: tl.constexpr, POSITIONS: tl.constexpr, GATHER: tl.constexpr
):
    """The j-th block of keys: their indices, which of them are wanted, where they lie in keys and in values, and the
    shift of their page. With GATHER blocks are counted from `low` and may lie in several pages, else in one each."""
    i = tl.arange(0, POSITIONS)
    if GATHER:
        index = low + j * POSITIONS + i
        seen = index < high
        entry, slot = index // S, index % S
    else:
        blocks: tl.constexpr = (S + POSITIONS - 1) // POSITIONS
        entry, slot = j // blocks, j % blocks * POSITIONS + i
        index = entry * S + slot
        seen = (index >= low) & (index < high) & (slot < S)
    key_at, value_at = places_of(b, n, entry, slot, seen, cached, P, not GATHER)
    shift = 0
    if cached.shift is not None:
        shift = tl.load(cached.shift + b * cached.shift_b + n * cached.shift_n + entry * cached.shift_m)
    return index, seen, key_at, value_at, shift


@triton.jit
def ask_for_keys(
    low, high, b, n, cached, D: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    """Asks for the first AHEAD keys and values from `low` on to be brought to the L2 cache."""
    line: tl.constexpr = 128 // (cached.k.dtype.element_ty.primitive_bitwidth // 8)
    index = low + tl.arange(0, AHEAD)
    key_at, value_at = places_of(b, n, index // S, index % S, index < high, cached, P, False)
    k = tl.arange(0, BLOCK // line if line < BLOCK else 1)[None, :] * line
    here = (index < high)[:, None] & (k < D)
    ask_for(cached.k + key_at[:, None] + k, here)
    ask_for(cached.v + value_at[:, None] + k, here)


@triton.jit
def block_of(token, S: tl.constexpr, POSITIONS: tl.constexpr):
    """The block that a key lies in, where each lies in one page."""
    return token // S * ((S + POSITIONS - 1) // POSITIONS) + token % S // POSITIONS


@triton.jit
def weighed(top, total, acc, q_md, k_pd, v_pd, seen_mp, scaling, cap):
    """The sums with some more keys: `top` and scores are logarithms to base 2."""
    score = tl.dot(q_md, tl.trans(k_pd), input_precision="ieee") * scaling
    if cap is not None:
        score = cap - 2.0 * cap / (tl.exp2(score) + 1.0)
    score = tl.where(seen_mp, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(score - base[:, None])
    fade = tl.exp2(top - base)
    acc = acc * fade[:, None] + tl.dot(p.to(v_pd.dtype), v_pd, input_precision="ieee")
    return higher, total * fade + tl.sum(p, 1), acc


@triton.jit
def joined(
    room, item, first, last, heads, d, HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr
):
    """An item's results, of `heads` rows and query heads, from the parts that programs `first` to `last` have of them,
    PARTS at a time."""
    h = tl.arange(0, HEADS)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total, acc = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS, BLOCK), tl.float32)
    for start in range(first, last + 1, PARTS):
        tops, sums, accs = (), (), ()
        for i in tl.static_range(PARTS):  # all are on their way before the first is looked at
            at, here = (item + start + i) * HEADS + h, (h < heads) & (start + i <= last)
            tops += (tl.load(room.top + at, mask=here, other=float("-inf"), cache_modifier=".cg"),)
            sums += (tl.load(room.sum + at, mask=here, other=0.0, cache_modifier=".cg"),)
            here_d = here[:, None] & (d < D)
            accs += (tl.load(room.acc + at[:, None] * D + d, mask=here_d, other=0.0, cache_modifier=".cg"),)
        higher = top
        for i in tl.static_range(PARTS):
            higher = tl.maximum(higher, tops[i])
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(top - base)
        top, total, acc = higher, total * fade, acc * fade[:, None]
        for i in tl.static_range(PARTS):
            weight = tl.exp2(tops[i] - base)
            total += weight * sums[i]
            acc += weight[:, None] * accs[i]
    return quotient(acc, total)


@triton.jit
def quotient(acc, total):
    """Weighted values by the sum of weights; 0 where nothing was seen."""
    return tl.where(total[:, None] == 0, 0.0, acc / total[:, None])


@triton.jit
def heads_at(x, row, x_row, n, m, G: tl.constexpr, D: tl.constexpr):
    """Where heads of rows begin: of the rows from `row` on, those of the n-th key-value head."""
    return x + (row + m // G).to(tl.int64)[:, None] * x_row + (n * G + m % G)[:, None] * D
