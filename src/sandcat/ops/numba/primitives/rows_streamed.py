"""Products of rows, one row at a time, and sums of rows, two at a time, in float32 whatever the rows are stored as. On
processors that read ahead by themselves layers run so; elsewhere more rows at once (rows.py). Where these processors
multiply int8 or bfloat16 directly, so do the rows of an int8 layer, and those of a bfloat16 one for several tokens."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from sandcat.ops.numba.primitives.bfloat16_pairs import PAIRED, add4x2, dot1x2, dot4x4, halve
from sandcat.ops.numba.primitives.dtypes import widen
from sandcat.ops.numba.primitives.int8_vnni import WIDTH, split, sums_of_fours
from sandcat.ops.numba.primitives.memory import piece
from sandcat.ops.numba.primitives.processor import HAS_FOURS, HAS_PAIRS
from sandcat.ops.numba.primitives.registers import (
    LANES,
    LINE,
    apart,
    ask_far,
    fma,
    load,
    plus,
    splat,
    store,
    total,
    totals,
)

AT_ONCE = 8
"""Rows that one token is multiplied with before the next one: few enough to stay in the nearest cache."""
ROWS_AHEAD = 8
"""How many rows before a listed one is needed it is asked for."""


@njit(inline="always")
def dot(x, row):
    """x . row as float32, in four sums that do not wait for each other."""
    s0 = s1 = s2 = s3 = splat(np.float32(0))
    fours, whole = x.size // (4 * LANES) * (4 * LANES), x.size // LANES * LANES
    for k in range(0, fours, 4 * LANES):
        s0 = fma(load(x, k), load(row, k), s0)
        s1 = fma(load(x, k + LANES), load(row, k + LANES), s1)
        s2 = fma(load(x, k + 2 * LANES), load(row, k + 2 * LANES), s2)
        s3 = fma(load(x, k + 3 * LANES), load(row, k + 3 * LANES), s3)
    for k in range(fours, whole, LANES):
        s0 = fma(load(x, k), load(row, k), s0)
    t = total(plus(plus(s0, s1), plus(s2, s3)))
    for k in range(whole, x.size):
        t += widen(x[k]) * widen(row[k])
    return t


@njit
def rest(x, row, whole):
    """The product of what comes after whole registers; apart, or all rows would be slower."""
    apart()
    t = np.float32(0)
    for k in range(whole, x.size):
        t += widen(x[k]) * widen(row[k])
    return t


@njit(inline="always")
def dot1x4(x0, x1, x2, x3, row, out, c):
    """out[t, c] = row . x t."""
    s0 = s1 = s2 = s3 = splat(np.float32(0))
    whole = x0.size // LANES * LANES
    for k in range(0, whole, LANES):
        r = load(row, k)
        s0, s1, s2, s3 = (
            fma(load(x0, k), r, s0),
            fma(load(x1, k), r, s1),
            fma(load(x2, k), r, s2),
            fma(load(x3, k), r, s3),
        )
    out[0, c], out[1, c], out[2, c], out[3, c] = totals(s0, s1, s2, s3)
    for k in range(whole, x0.size):
        r = widen(row[k])
        out[0, c] += r * x0[k]
        out[1, c] += r * x1[k]
        out[2, c] += r * x2[k]
        out[3, c] += r * x3[k]


@njit
def row_of(units, c):
    """The c-th unit of a list, or of all."""
    if units is None:
        return c
    return units[c]


@njit
def four_rows(rows, units, c):
    """Four rows from the c-th on; of the listed ones, where there is a list."""
    return rows[row_of(units, c)], rows[row_of(units, c + 1)], rows[row_of(units, c + 2)], rows[row_of(units, c + 3)]


def dot_one_by_one(x, rows, units, out):
    """See `vectors.dot_rows`."""


@overload(dot_one_by_one)
def _(x, rows, units, out):
    if rows.dtype == types.uint16 and HAS_PAIRS:
        return _by_pairs
    return _by_digits if rows.dtype == types.int8 and HAS_FOURS else _by_floats


def _by_floats(x, rows, units, out):
    tokens = len(x) // 4 * 4
    for c in range(out.shape[1]):
        row = rows[row_of(units, c)]
        for t in range(0, tokens, 4):
            dot1x4(x[t], x[t + 1], x[t + 2], x[t + 3], row, out[t : t + 4], c)
        for t in range(tokens, len(x)):
            out[t, c] = dot(x[t], row)


@njit
def _at_a_line(size):
    """An array of bytes that begins where a line of memory does: else each load of a register would take two."""
    room = np.empty(size + LINE, np.int8)
    first = -room.ctypes.data % LINE
    return room[first : first + size]


@njit
def _halved(x, whole):
    """The first `whole` numbers of each token as bfloat16, and whether all of them are."""
    tokens = len(x)
    halves, exact = _at_a_line(2 * tokens * whole).view(np.uint16).reshape(tokens, whole), True
    for t in range(tokens):
        exact &= halve(piece(x, t, 0, whole), halves[t])
    return halves, exact


@njit
def _ahead(rows, units, c, count):
    """Where the four rows from the c-th on begin in memory; at the end, the last four."""
    c, size = max(0, min(c, count - 4)), rows.shape[1]
    return (
        row_of(units, c) * size,
        row_of(units, c + 1) * size,
        row_of(units, c + 2) * size,
        row_of(units, c + 3) * size,
    )


def _by_pairs(x, rows, units, out):
    tokens, count, whole = len(x), out.shape[1], x.shape[1] // PAIRED * PAIRED
    halves, exact = _halved(x, whole if tokens > 1 else 0)
    fours, twos = (tokens // 4 * 4, tokens // 2 * 2) if halves.size and exact else (0, 0)
    for first in range(0, count, 4):
        end = min(first + 4, count)
        if fours and end == first + 4:
            row0, row1, row2, row3 = four_rows(rows, units, first)
            ahead = _ahead(rows, units, end, count)
            for t in range(0, fours, 4):
                x0, x1, x2, x3 = halves[t], halves[t + 1], halves[t + 2], halves[t + 3]
                dot4x4(x0, x1, x2, x3, row0, row1, row2, row3, rows, ahead, out[t : t + 4], first)
        for c in range(first, end):
            row = rows[row_of(units, c)]
            for t in range(fours if end == first + 4 else 0, twos, 2):
                dot1x2(halves[t], halves[t + 1], row, out[t : t + 2], c)
            if whole != x.shape[1]:
                for t in range(twos):
                    out[t, c] += rest(x[t], row, whole)
            for t in range(twos, tokens):
                out[t, c] = dot(x[t], row)


def _by_digits(x, rows, units, out):
    tokens, whole = len(x), x.shape[1] // WIDTH * WIDTH
    digits, factors = _at_a_line(tokens * 3 * whole).reshape(tokens, 3, whole), np.empty((tokens, 2), np.float32)
    for t in range(tokens):
        factors[t, 0], factors[t, 1] = split(piece(x, t, 0, whole), digits[t])
    together = max(1, out.shape[1]) if tokens == 1 else AT_ONCE  # a thread may have no outputs
    for first in range(0, out.shape[1], together):
        end = min(first + together, out.shape[1])
        for t in range(tokens):
            _dot_some(x[t], digits[t], factors[t, 0], factors[t, 1], rows, units, out[t], first, end)


@njit
def _dot_some(x, digits, back, extra, rows, units, out, first, end):
    """out[c] of one token, for c from `first` to `end`: rows one after another, their lanes added up four at once."""
    apart()
    if back != back:
        for c in range(first, end):
            out[c] = dot(x, rows[row_of(units, c)])
        return
    d0, d1, d2 = digits
    fours, whole = first + (end - first) // 4 * 4, d0.size
    for c in range(first, fours, 4):
        row0, row1, row2, row3 = four_rows(rows, units, c)
        t0, t1, t2, t3 = totals(
            sums_of_fours(d0, d1, d2, row0),
            sums_of_fours(d0, d1, d2, row1),
            sums_of_fours(d0, d1, d2, row2),
            sums_of_fours(d0, d1, d2, row3),
        )
        out[c], out[c + 1] = (t0 - extra) * back, (t1 - extra) * back
        out[c + 2], out[c + 3] = (t2 - extra) * back, (t3 - extra) * back
    for c in range(fours, end):
        out[c] = (total(sums_of_fours(d0, d1, d2, rows[row_of(units, c)])) - extra) * back
    if whole != x.size:
        for c in range(first, end):
            out[c] += rest(x, rows[row_of(units, c)], whole)


@njit
def add(y, h, row):
    """y += h * row."""
    v = splat(h)
    whole = y.size // LANES * LANES
    for k in range(0, whole, LANES):
        store(y, k, fma(v, load(row, k), load(y, k)))
    for k in range(whole, y.size):
        y[k] += h * widen(row[k])


@njit(inline="always")
def _add_two(y, h0, h1, row0, row1, later0, later1, first):
    """y += h0 * row0[first:] + h1 * row1[first:], while two later rows are asked for."""
    v0, v1, line = splat(h0), splat(h1), LINE // row0.itemsize
    whole = y.size // (4 * LANES) * (4 * LANES)
    for start in range(0, whole, 4 * LANES):
        for k in range(start, start + 4 * LANES, line):
            ask_far(later0, first + k)
            ask_far(later1, first + k)
        for k in range(start, start + 4 * LANES, LANES):
            at = first + k
            store(y, k, fma(v1, load(row1, at), fma(v0, load(row0, at), load(y, k))))
    if whole < y.size:
        add(y[whole:], h0, row0[first + whole : first + y.size])
        add(y[whole:], h1, row1[first + whole : first + y.size])


def add_one_by_one(y, h, rows, units, first):
    """See `vectors.add_rows`."""


@overload(add_one_by_one)
def _(y, h, rows, units, first):
    return _add_by_pairs if rows.dtype == types.uint16 and HAS_PAIRS else _add_by_floats


def _add_by_pairs(y, h, rows, units, first):
    (tokens, count), width = h.shape, y.shape[1]
    halves, exact = _halved(h, count // 4 * 4 if tokens > 1 else 0)
    whole, quads = width // PAIRED * PAIRED, halves.shape[1] if exact else 0
    pairs, twos = halves.view(np.int32), tokens // 2 * 2 if quads else 0
    for c in range(0, quads, 4):
        row0, row1, row2, row3 = four_rows(rows, units, c)
        ahead = _ahead(rows, units, c + ROWS_AHEAD, quads)
        for t in range(0, twos, 2):
            h0, h1 = pairs[t, c // 2 : c // 2 + 2], pairs[t + 1, c // 2 : c // 2 + 2]
            add4x2(y[t], y[t + 1], h0, h1, row0, row1, row2, row3, rows, ahead, first)
        for t in range(tokens):
            at = whole if t < twos else 0
            if at < width:
                for n in range(c, c + 4):
                    add(y[t, at:], h[t, n], rows[row_of(units, n)][first + at : first + width])
    if quads < count:
        _add_floats(y, h, rows, units, first, quads)


def _add_by_floats(y, h, rows, units, first):
    _add_floats(y, h, rows, units, first, 0)


@njit
def _add_floats(y, h, rows, units, first, start):
    """Adds the rows from the one at `start` on."""
    apart()
    count, width, pairs = h.shape[1], y.shape[1], h.shape[1] // 2 * 2  # `start` is even
    for c in range(start, pairs, 2):
        row0, row1, later = rows[row_of(units, c)], rows[row_of(units, c + 1)], min(c + ROWS_AHEAD, count - 2)
        later0, later1 = rows[row_of(units, later)], rows[row_of(units, later + 1)]
        _add_two(y[0], h[0, c], h[0, c + 1], row0, row1, later0, later1, first)
        for t in range(1, len(y)):
            add(y[t], h[t, c], row0[first : first + width])
            add(y[t], h[t, c + 1], row1[first : first + width])
    for c in range(max(start, pairs), count):
        for t in range(len(y)):
            add(y[t], h[t, c], rows[row_of(units, c)][first : first + width])
