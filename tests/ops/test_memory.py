"""What kernels see of memory: parts of arrays are what slices of them are, and records what was written into them."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from sandcat.ops.numba.primitives.matrices import MATRIX, matrix
from sandcat.ops.numba.primitives.memory import block, clear, columns, fill, part, piece, record, record_at
from sandcat.ops.numba.primitives.threads import at_address, call
from sandcat.ops.weights import Stored


@njit
def looked_at(array, line):
    """Copies of parts, which do not last."""
    return (
        piece(array, 2, 1, 4).copy(),
        columns(array, 3, 5).copy(),
        block(array, 2, 1, 4).copy(),
        part(line, 2, 6).copy(),
    )


def test_parts_are_slices():
    """Of whole arrays, and of parts of them, whose rows lie farther apart."""
    whole, line = np.arange(60, dtype=np.float32).reshape(5, 12), np.arange(9)
    for array in (whole, whole[:, 2:9], whole[::2]):
        found = looked_at(array, line)
        want = (array[2, 1:4], array[:, 3:5], array[:2, 1:4], line[2:6])
        assert all(map(np.array_equal, found, want))


def test_some_columns_are_cleared():
    array = np.ones((3, 6), np.float32)
    njit(lambda array: clear(array, 1, 4))(array)
    assert array.tolist() == [[1, 0, 0, 0, 1, 1]] * 3


def test_records_are_read_where_they_lie():
    kind = record("count x missing", "share", weight=MATRIX)
    x, stored = torch.arange(6.0).reshape(2, 3).t(), Stored(torch.ones(4, 3), bias=torch.ones(4))
    entry = np.zeros(1, kind)
    held = fill(entry[0], count=3, x=x, missing=None, share=0.5, weight=matrix(stored, "dots"))

    @njit
    def read(address):
        found = record_at(address, kind)
        return found.count, found.x, found.missing, found.share, found.weight.outputs, found.weight.bias

    count, at, missing, share, outputs, bias = read(entry.ctypes.data)
    assert (count, missing, share, outputs) == (3, 0, 0.5, 4)
    assert {at, bias} <= {tensor.data_ptr() for tensor in held} and bias == stored.bias.data_ptr()
    assert torch.equal(next(tensor for tensor in held if tensor.data_ptr() == at), x)  # a copy, as x is not contiguous


def test_a_function_is_called_at_its_address():
    kind = record("n")

    def body(at, number):
        record_at(at, kind).n += number

    total = np.zeros(1, np.int64)
    address = at_address(body)
    njit(lambda address, at: call(address, (at, np.int32(5))))(address, total.ctypes.data)
    assert total[0] == 5
