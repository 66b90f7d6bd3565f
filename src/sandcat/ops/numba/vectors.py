"""Products and sums of rows, in float32 whatever the rows are stored as."""

from __future__ import annotations

import numpy as np
from numba import njit

from sandcat.ops.numba.floats import widen

REORDER = {"reassoc", "contract", "nsz"}
"""The only liberties with arithmetic: the order of sums. NaN and infinity behave as they must."""


@njit(fastmath=REORDER)
def dot(x, row):
    total = np.float32(0)
    for k in range(x.size):
        total += widen(x[k]) * widen(row[k])
    return total


@njit(fastmath=REORDER)
def dot4(x, row0, row1, row2, row3):
    """Four dots with x: one token with four rows, or one row with four tokens."""
    t0 = t1 = t2 = t3 = np.float32(0)
    for k in range(x.size):
        t0 += widen(x[k]) * widen(row0[k])
        t1 += widen(x[k]) * widen(row1[k])
        t2 += widen(x[k]) * widen(row2[k])
        t3 += widen(x[k]) * widen(row3[k])
    return t0, t1, t2, t3


@njit(fastmath=REORDER)
def dots(x, row, out):
    """out[t] = x[t] . row for all tokens, reading the row from memory once."""
    for t in range(0, len(x) // 4 * 4, 4):
        out[t], out[t + 1], out[t + 2], out[t + 3] = dot4(row, x[t], x[t + 1], x[t + 2], x[t + 3])
    for t in range(len(x) // 4 * 4, len(x)):
        out[t] = dot(x[t], row)


@njit(fastmath=REORDER)
def add4(y, h, row0, row1, row2, row3):
    for k in range(y.size):
        y[k] += h[0] * widen(row0[k]) + h[1] * widen(row1[k]) + h[2] * widen(row2[k]) + h[3] * widen(row3[k])


@njit(fastmath=REORDER)
def add(y, h, row):
    for k in range(y.size):
        y[k] += h * widen(row[k])


@njit(fastmath=REORDER)
def dot4x4(x0, x1, x2, x3, row0, row1, row2, row3, out):
    """out[i, t] = row i . x t."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for k in range(x0.size):
        r0, r1, r2, r3 = widen(row0[k]), widen(row1[k]), widen(row2[k]), widen(row3[k])
        a0 += r0 * x0[k]
        a1 += r0 * x1[k]
        a2 += r0 * x2[k]
        a3 += r0 * x3[k]
        b0 += r1 * x0[k]
        b1 += r1 * x1[k]
        b2 += r1 * x2[k]
        b3 += r1 * x3[k]
        c0 += r2 * x0[k]
        c1 += r2 * x1[k]
        c2 += r2 * x2[k]
        c3 += r2 * x3[k]
        d0 += r3 * x0[k]
        d1 += r3 * x1[k]
        d2 += r3 * x2[k]
        d3 += r3 * x3[k]
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = a0, a1, a2, a3
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = b0, b1, b2, b3
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = c0, c1, c2, c3
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = d0, d1, d2, d3


@njit
def dots4(x, rows, units, out):
    """out[c, t] = rows[units[c]] . x[t]: each row is read from memory once, four at a time."""
    fours, tokens = units.size // 4 * 4, len(x) // 4 * 4
    for c in range(0, fours, 4):
        row0, row1, row2, row3 = rows[units[c]], rows[units[c + 1]], rows[units[c + 2]], rows[units[c + 3]]
        for t in range(0, tokens, 4):
            dot4x4(x[t], x[t + 1], x[t + 2], x[t + 3], row0, row1, row2, row3, out[c : c + 4, t : t + 4])
        for t in range(tokens, len(x)):
            out[c, t], out[c + 1, t], out[c + 2, t], out[c + 3, t] = dot4(x[t], row0, row1, row2, row3)
    for c in range(fours, units.size):
        dots(x, rows[units[c]], out[c])


@njit(fastmath=REORDER)
def add4x4(y0, y1, y2, y3, h, row0, row1, row2, row3):
    """y t += h[0, t] row 0 + ... + h[3, t] row 3, for four tokens."""
    a0, a1, a2, a3 = h[0, 0], h[0, 1], h[0, 2], h[0, 3]
    b0, b1, b2, b3 = h[1, 0], h[1, 1], h[1, 2], h[1, 3]
    c0, c1, c2, c3 = h[2, 0], h[2, 1], h[2, 2], h[2, 3]
    d0, d1, d2, d3 = h[3, 0], h[3, 1], h[3, 2], h[3, 3]
    for k in range(y0.size):
        r0, r1, r2, r3 = widen(row0[k]), widen(row1[k]), widen(row2[k]), widen(row3[k])
        y0[k] += a0 * r0 + b0 * r1 + c0 * r2 + d0 * r3
        y1[k] += a1 * r0 + b1 * r1 + c1 * r2 + d1 * r3
        y2[k] += a2 * r0 + b2 * r1 + c2 * r2 + d2 * r3
        y3[k] += a3 * r0 + b3 * r1 + c3 * r2 + d3 * r3


@njit
def add_rows(y, h, rows, units):
    """y[t] += sum over c of h[c, t] rows[units[c]], in pieces of y that stay in the cache."""
    fours, tokens, width = units.size // 4 * 4, len(y) // 4 * 4, max(256, 8192 // len(y))
    for start in range(0, y.shape[1], width):
        piece = slice(start, min(start + width, y.shape[1]))
        for c in range(0, fours, 4):
            row0, row1 = rows[units[c], piece], rows[units[c + 1], piece]
            row2, row3 = rows[units[c + 2], piece], rows[units[c + 3], piece]
            for t in range(0, tokens, 4):
                add4x4(
                    y[t, piece], y[t + 1, piece], y[t + 2, piece], y[t + 3, piece], h[c : c + 4, t : t + 4],
                    row0, row1, row2, row3,
                )  # fmt: skip
            for t in range(tokens, len(y)):
                add4(y[t, piece], h[c : c + 4, t], row0, row1, row2, row3)
        for c in range(fours, units.size):
            for t in range(len(y)):
                add(y[t, piece], h[c, t], rows[units[c], piece])
