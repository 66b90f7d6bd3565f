"""A matrix as kernels read it, in whatever format it is stored: a record, and what is computed with it.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives import products
from sandcat.ops.numba.primitives.dtypes import storage, unit_of, widen
from sandcat.ops.numba.primitives.memory import numbers, piece, record
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.weights import Stored

FIELDS = "weight itemsize outputs inputs scale bias dots listed_dots sums"
MATRIX = record(FIELDS, "unit")
"""Addresses and sizes, 0 for what a matrix lacks, and the number `dtypes.unit_of`. It is stored [outputs, inputs], or
by inputs, [inputs, outputs]; `dots`, `listed_dots` and `sums` are the functions that read it (see products.py)."""
READERS = {"dots": products.DOTS, "listed_dots": products.LISTED_DOTS, "sums": products.SUMS}


def matrix(stored: Stored, reader: str, *, tiles: bool = False) -> dict[str, Any]:
    """What `memory.fill` writes into a record with `FIELDS` and `unit`; of `sums` the matrix lies by inputs.

    Args:
        reader: of `READERS`.
        tiles: by the processor's matrix unit.
    """
    codes, scale, _, bias, format = stored
    (outputs, inputs), rows = codes.shape, codes.t() if reader == "sums" else codes
    return {
        "weight": rows, "itemsize": rows.itemsize, "outputs": outputs, "inputs": inputs, "scale": scale, "bias": bias,
        "unit": unit_of(format), reader: products.function(READERS[reader], storage(format, codes.dtype), tiles),
    }  # fmt: skip


@njit
def _scales(matrix, like):
    return numbers(matrix.scale, (matrix.outputs if matrix.scale else 0,), like)


@njit
def _biases(matrix, like):
    return numbers(matrix.bias, (matrix.outputs if matrix.bias else 0,), like)


@njit
def outputs_from(matrix, x, first, y, room, like):
    """y [T, O] = so many outputs, from `first` on."""
    rows = matrix.weight + first * matrix.inputs * matrix.itemsize
    products.dots(matrix.dots, x, rows, np.empty(0, np.int64), y, room)
    scaled(matrix, y, len(y), first, like)


@njit
def scaled(matrix, y, tokens, first, like):
    """Sums of codes become outputs, those from `first` on: by their scales, and with the bias."""
    apart()
    unit, scale, bias = np.float32(matrix.unit), _scales(matrix, like), _biases(matrix, like)
    for t in range(tokens):
        row = piece(y, t, 0, y.shape[1])
        if scale.size:
            for r in range(row.size):
                row[r] *= widen(scale[first + r]) * unit
        if bias.size:
            for r in range(row.size):
                row[r] += widen(bias[first + r])


@njit
def listed_outputs(matrix, x, kept, values, tokens, room, like):
    """values[:, c] = output kept[c], of the first `tokens`."""
    apart()
    products.dots(matrix.listed_dots, x, matrix.weight, kept, values, room)
    unit, scale, bias = np.float32(matrix.unit), _scales(matrix, like), _biases(matrix, like)
    for t in range(tokens):
        row = piece(values, t, 0, kept.size)
        for c in range(kept.size):
            if scale.size:
                row[c] *= widen(scale[kept[c]]) * unit
            if bias.size:
                row[c] += widen(bias[kept[c]])


@njit
def add_inputs(matrix, y, h, units, first, room):
    """y [T, O] += what inputs h [T, units] of a matrix that lies by inputs give to outputs from `first` on, without
    scales and bias."""
    products.sums(matrix.sums, y, h, matrix.weight, matrix.outputs, units, first, room)
