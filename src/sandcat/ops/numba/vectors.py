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
