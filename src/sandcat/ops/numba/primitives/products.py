"""Products and sums of rows as functions at addresses: compiled once for each way that rows are stored, for all kernels
that call them. A kernel that had their code in it would be compiled for every format that its weights may have, and as
Numba optimises what a function calls once more with each function that calls it, for minutes.

Shapes: T tokens, C rows, I inputs, O outputs, as in rows.py.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, njit

from sandcat.ops.numba.primitives.memory import pointer
from sandcat.ops.numba.primitives.rows import add_rows, dot_rows
from sandcat.ops.numba.primitives.rows_amx import add_rows_tiled, dot_rows_tiled, pack_columns
from sandcat.ops.numba.primitives.threads import VERSION, at_address, call

DOTS, LISTED_DOTS, SUMS, PACK = range(4)
"""Products with all rows, or with those listed; sums of listed rows; x laid out for the processor's matrix unit."""
MANY = 2**31
"""Rows, where nobody asks how many there are."""


@cache
def function(kind: int, storage: np.dtype, tiles: bool = False) -> int:
    """The address of a function, compiled on first use (and then cached on disk).

    Args:
        storage: of the rows.
        tiles: by the processor's matrix unit, see rows_amx.py.
    """
    version = VERSION

    def body(x, x_row, tokens, inputs, rows, width, units, y, y_row, outputs, first, room, size):
        if tokens == version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        x_TI = carray(pointer(x), (tokens, x_row), np.float32)[:, :inputs]
        y_TO = carray(pointer(y), (tokens, y_row), np.float32)[:, :outputs]
        rows_CI = carray(pointer(rows), (MANY, width), storage)
        units_C = carray(pointer(units), (inputs if kind == SUMS else outputs,), np.int64)
        scratch = carray(pointer(room), (size,), np.int32)
        if kind == PACK:
            pack_columns(x_TI, scratch)
        elif kind == SUMS:
            if tiles:
                add_rows_tiled(y_TO, x_TI, rows_CI, units_C, scratch, first)
            else:
                add_rows(y_TO, x_TI, rows_CI, units_C, first)
        elif kind == LISTED_DOTS:
            if tiles:
                dot_rows_tiled(x_TI, rows_CI, units_C, y_TO, scratch)
            else:
                dot_rows(x_TI, rows_CI, units_C, y_TO)
        elif tiles:
            dot_rows_tiled(x_TI, rows_CI, None, y_TO, scratch)
        else:
            dot_rows(x_TI, rows_CI, None, y_TO)

    return at_address(body)


@njit
def _row(array):
    """How many float32 the rows of an array lie apart."""
    return array.strides[0] // 4


@njit
def dots(function, x, rows, units, out, room):
    """out[t, c] = rows[units[c]] . x[t], or of all rows; `rows`: their address, as many inputs wide as x."""
    I, listed = x.shape[1], units.ctypes.data
    numbers = (x.ctypes.data, _row(x), len(x), I, rows, I, listed, out.ctypes.data, _row(out), out.shape[1])
    call(function, (*numbers, 0, room.ctypes.data, room.size))


@njit
def sums(function, y, h, rows, width, units, first, room):
    """y[t] += sum over c of h[t, c] rows[units[c]][first:], as wide as y; `rows`: the address of rows of a `width`."""
    numbers = (h.ctypes.data, _row(h), len(h), h.shape[1], rows, width, units.ctypes.data, y.ctypes.data, _row(y))
    call(function, (*numbers, y.shape[1], first, room.ctypes.data, room.size))


@njit
def packed(function, x, room):
    """Lays x out for products that have `tiles`."""
    at = x.ctypes.data
    call(function, (at, _row(x), len(x), x.shape[1], at, 0, at, at, 0, 0, 0, room.ctypes.data, room.size))
