"""Products and sums of several rows at once, and norms, in float32 whatever the rows are stored as."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.dtypes import rounded, widen
from sandcat.ops.numba.primitives.processor import ONE_BY_ONE
from sandcat.ops.numba.primitives.registers import LANES, LINE, apart, ask, fma, load, splat, store, totals
from sandcat.ops.numba.primitives.rows_streamed import (
    add,
    add_one_by_one,
    dot,
    dot_one_by_one,
    four_rows,
    row_of,
)

BLOCK = 64


@njit
def dot4(x, row0, row1, row2, row3, next0, next1, next2, next3):
    """Four dots with x, while the first part of the next four rows is asked for: memory is not fast by itself, but by
    how much is on its way at a time."""
    s0 = s1 = s2 = s3 = splat(np.float32(0))
    line = LINE // row0.itemsize
    whole = x.size // LANES * LANES
    for start in range(0, whole, line):
        ask(next0, start)
        ask(next1, start)
        ask(next2, start)
        ask(next3, start)
        for k in range(start, min(start + line, whole), LANES):
            v = load(x, k)
            s0 = fma(v, load(row0, k), s0)
            s1 = fma(v, load(row1, k), s1)
            s2 = fma(v, load(row2, k), s2)
            s3 = fma(v, load(row3, k), s3)
    t0, t1, t2, t3 = totals(s0, s1, s2, s3)
    for k in range(whole, x.size):
        v = widen(x[k])
        t0 += v * widen(row0[k])
        t1 += v * widen(row1[k])
        t2 += v * widen(row2[k])
        t3 += v * widen(row3[k])
    return t0, t1, t2, t3


@njit
def dot4x4(x0, x1, x2, x3, row0, row1, row2, row3, out):
    """out[t, i] = row i . x t."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = splat(np.float32(0))
    whole = x0.size // LANES * LANES
    for k in range(0, whole, LANES):
        r0, r1, r2, r3 = load(row0, k), load(row1, k), load(row2, k), load(row3, k)
        v = load(x0, k)
        a0, b0, c0, d0 = fma(r0, v, a0), fma(r1, v, b0), fma(r2, v, c0), fma(r3, v, d0)
        v = load(x1, k)
        a1, b1, c1, d1 = fma(r0, v, a1), fma(r1, v, b1), fma(r2, v, c1), fma(r3, v, d1)
        v = load(x2, k)
        a2, b2, c2, d2 = fma(r0, v, a2), fma(r1, v, b2), fma(r2, v, c2), fma(r3, v, d2)
        v = load(x3, k)
        a3, b3, c3, d3 = fma(r0, v, a3), fma(r1, v, b3), fma(r2, v, c3), fma(r3, v, d3)
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = totals(a0, b0, c0, d0)
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = totals(a1, b1, c1, d1)
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = totals(a2, b2, c2, d2)
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = totals(a3, b3, c3, d3)
    for k in range(whole, x0.size):
        for i, row in enumerate((row0, row1, row2, row3)):
            r = widen(row[k])
            out[0, i] += r * x0[k]
            out[1, i] += r * x1[k]
            out[2, i] += r * x2[k]
            out[3, i] += r * x3[k]


@njit
def dot_rows(x, rows, units, out):
    """out[t, c] = rows[units[c]] . x[t], of all rows if units is None: each is read from memory once."""
    apart()
    count = out.shape[1]
    fours, tokens = count // 4 * 4, len(x) // 4 * 4
    if ONE_BY_ONE:
        dot_one_by_one(x, rows, units, out)
        return
    for c in range(0, fours, 4):
        row0, row1, row2, row3 = four_rows(rows, units, c)
        next0, next1, next2, next3 = four_rows(rows, units, min(c + 4, count - 4))
        for t in range(0, tokens, 4):
            dot4x4(x[t], x[t + 1], x[t + 2], x[t + 3], row0, row1, row2, row3, out[t : t + 4, c : c + 4])
        for t in range(tokens, len(x)):
            four = dot4(x[t], row0, row1, row2, row3, next0, next1, next2, next3)
            out[t, c], out[t, c + 1], out[t, c + 2], out[t, c + 3] = four
    for c in range(fours, count):
        for t in range(len(x)):
            out[t, c] = dot(x[t], rows[row_of(units, c)])


@njit
def add8(y, h, rows, units, c, first):
    """y += h[c] * row c + ... + h[c + 7] * row c + 7, of the listed rows from `first` on; the next ones are asked for
    as in `dot4`."""
    h0, h1, h2, h3 = splat(h[c]), splat(h[c + 1]), splat(h[c + 2]), splat(h[c + 3])
    h4, h5, h6, h7 = splat(h[c + 4]), splat(h[c + 5]), splat(h[c + 6]), splat(h[c + 7])
    row0, row1, row2, row3 = four_rows(rows, units, c)
    row4, row5, row6, row7 = four_rows(rows, units, c + 4)
    n = min(c + 8, h.size - 8)
    next0, next1, next2, next3 = four_rows(rows, units, n)
    next4, next5, next6, next7 = four_rows(rows, units, n + 4)
    line = LINE // rows.itemsize
    whole = y.size // LANES * LANES
    for start in range(0, whole, line):
        ask(next0, first + start)
        ask(next1, first + start)
        ask(next2, first + start)
        ask(next3, first + start)
        ask(next4, first + start)
        ask(next5, first + start)
        ask(next6, first + start)
        ask(next7, first + start)
        for k in range(start, min(start + line, whole), LANES):
            at = first + k
            s = fma(h1, load(row1, at), fma(h0, load(row0, at), load(y, k)))
            s = fma(h3, load(row3, at), fma(h2, load(row2, at), s))
            s = fma(h5, load(row5, at), fma(h4, load(row4, at), s))
            store(y, k, fma(h7, load(row7, at), fma(h6, load(row6, at), s)))
    for k in range(whole, y.size):
        for i in range(8):
            y[k] += h[c + i] * widen(rows[row_of(units, c + i), first + k])


@njit
def _add4(y, at, h, rows, units, c, end, first):
    """y[t, at : at + 4 * LANES] += h[t, c] row c + ... + h[t, end - 1] row end - 1, for four tokens, whose sums stay in
    registers."""
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    a0, a1, a2, a3 = load(y0, at), load(y1, at), load(y2, at), load(y3, at)
    b0, b1, b2, b3 = load(y0, at + LANES), load(y1, at + LANES), load(y2, at + LANES), load(y3, at + LANES)
    at2, at3 = at + 2 * LANES, at + 3 * LANES
    c0, c1, c2, c3 = load(y0, at2), load(y1, at2), load(y2, at2), load(y3, at2)
    d0, d1, d2, d3 = load(y0, at3), load(y1, at3), load(y2, at3), load(y3, at3)
    for n in range(c, end):
        row, from_ = rows[row_of(units, n)], first + at
        r0, r1 = load(row, from_), load(row, from_ + LANES)
        r2, r3 = load(row, from_ + 2 * LANES), load(row, from_ + 3 * LANES)
        v = splat(h[0, n])
        a0, b0, c0, d0 = fma(r0, v, a0), fma(r1, v, b0), fma(r2, v, c0), fma(r3, v, d0)
        v = splat(h[1, n])
        a1, b1, c1, d1 = fma(r0, v, a1), fma(r1, v, b1), fma(r2, v, c1), fma(r3, v, d1)
        v = splat(h[2, n])
        a2, b2, c2, d2 = fma(r0, v, a2), fma(r1, v, b2), fma(r2, v, c2), fma(r3, v, d2)
        v = splat(h[3, n])
        a3, b3, c3, d3 = fma(r0, v, a3), fma(r1, v, b3), fma(r2, v, c3), fma(r3, v, d3)
    store(y0, at, a0)
    store(y0, at + LANES, b0)
    store(y0, at2, c0)
    store(y0, at3, d0)
    store(y1, at, a1)
    store(y1, at + LANES, b1)
    store(y1, at2, c1)
    store(y1, at3, d1)
    store(y2, at, a2)
    store(y2, at + LANES, b2)
    store(y2, at2, c2)
    store(y2, at3, d2)
    store(y3, at, a3)
    store(y3, at + LANES, b3)
    store(y3, at2, c3)
    store(y3, at3, d3)


TOGETHER = 32
"""Rows that several tokens add a piece of, before the next piece: few enough to stay in the nearest cache."""


@njit
def add_rows(y, h, rows, units, first=0):
    """y[t] += sum over c of h[t, c] rows[units[c]][first:], as wide as y, of all rows if units is None."""
    apart()
    if ONE_BY_ONE:
        add_one_by_one(y, h, rows, units, first)
        return
    count, tokens, width = h.shape[1], len(y) // 4 * 4, 4 * LANES
    for t in range(tokens, len(y)):
        _add_rows(y[t], h[t], rows, units, first)
    if tokens:
        whole, line = y.shape[1] // width * width, LINE // rows.itemsize
        for c in range(0, count, TOGETHER):
            end = min(c + TOGETHER, count)
            for at in range(0, whole, width):
                ahead, shift = (at + width, 0) if at + width < whole else (0, TOGETHER)
                for n in range(c + shift, min(end + shift, count)):
                    row = rows[row_of(units, n)]
                    for k in range(0, width, line):
                        ask(row, first + ahead + k)
                for t in range(0, tokens, 4):
                    _add4(y[t : t + 4], at, h[t : t + 4], rows, units, c, end, first)
            for n in range(c, end):
                for t in range(tokens):
                    add(y[t, whole:], h[t, n], rows[row_of(units, n), first + whole : first + y.shape[1]])


@njit
def _add_rows(y, h, rows, units, first):
    """`add_rows` for one token."""
    eights = h.size // 8 * 8
    for c in range(0, eights, 8):
        add8(y, h, rows, units, c, first)
    for c in range(eights, h.size):
        add(y, h[c], rows[row_of(units, c), first : first + y.size])


@njit(fastmath={"reassoc", "contract"})
def norm(h, weight, eps, x):
    """x = RMSNorm(h), rounded as transformers rounds it."""
    total = np.float32(0)
    for k in range(h.size):
        total += h[k] * h[k]
    scale = np.float32(1 / math.sqrt(total / h.size + eps))
    for k in range(h.size):
        x[k] = rounded(rounded(h[k] * scale, weight[k]) * widen(weight[k]), weight[k])
