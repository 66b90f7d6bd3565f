"""What kernels see of memory: arrays and records at addresses, and parts of arrays.

Slices of arrays do the same, and take Numba long to compile: they may have any step and count from the end. What is
made here is used while what it is a part of is alive.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from torch import Tensor


def record(integers: str, reals: str = "", **nested: np.dtype) -> np.dtype:
    """A record of int64 and float64 by their names, and of other records."""
    fields = [(name, np.int64) for name in integers.split()] + [(name, np.float64) for name in reals.split()]
    return np.dtype(fields + list(nested.items()))


def fill(entry: np.void, **values: Any) -> list[Tensor]:
    """Writes numbers as they are, tensors as their addresses, None as 0, and what is said of a record in it.

    Returns:
        The tensors, to be kept as long as the record is read.
    """
    held: list[Tensor] = []
    for name, value in values.items():
        if isinstance(value, dict):
            held += fill(entry[name], **value)
            continue
        if isinstance(value, Tensor):
            held.append(value.detach().contiguous())
            value = held[-1].data_ptr()
        entry[name] = 0 if value is None else value
    return held


@intrinsic
def pointer(typing, address):
    """An integer as an address, for `carray`."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@njit
def record_at(address, kind):
    """The record of a dtype at an address."""
    return carray(pointer(address), (1,), kind)[0]


@njit
def numbers(address, shape, like):
    """The array of what is stored as `like` at an address."""
    return carray(pointer(address), shape, like.dtype)


@njit
def float32s(address, shape):
    """The array of float32 at an address."""
    return carray(pointer(address), shape, np.float32)


def _part(context, builder, source_type, source, first, kind, sizes, strides):
    """The array of a kind that begins so many bytes after another one."""
    given, made = context.make_array(source_type)(context, builder, source), context.make_array(kind)(context, builder)
    data = cgutils.pointer_add(builder, given.data, first)
    populate_array(made, data=data, shape=sizes, strides=strides, itemsize=given.itemsize, meminfo=None)
    return made._getvalue()


def _layout(context, builder, kind, array):
    """Strides and the size of an element, in bytes."""
    made = context.make_array(kind)(context, builder, array)
    return cgutils.unpack_tuple(builder, made.strides), made.itemsize


@intrinsic
def piece(typing, array, row, first, end):
    """array[row, first:end] of an array [rows, columns] whose rows are contiguous, as Numba does not know where it is a
    part of another one: loops over strides are not vectorised."""
    kind = types.Array(array.dtype, 1, "C")

    def generate(context, builder, signature, args):
        source, row, first, end = args
        strides, itemsize = _layout(context, builder, array, source)
        at = builder.add(builder.mul(row, strides[0]), builder.mul(first, itemsize))
        return _part(context, builder, array, source, at, kind, [builder.sub(end, first)], [itemsize])

    return kind(array, types.intp, types.intp, types.intp), generate


@intrinsic
def block(typing, array, rows, first, end):
    """array[:rows, first:end] of an array whose rows are contiguous."""
    kind = types.Array(array.dtype, 2, "A")

    def generate(context, builder, signature, args):
        source, rows, first, end = args
        strides, itemsize = _layout(context, builder, array, source)
        at, sizes = builder.mul(first, itemsize), [rows, builder.sub(end, first)]
        return _part(context, builder, array, source, at, kind, sizes, strides)

    return kind(array, types.intp, types.intp, types.intp), generate


@njit
def columns(array, first, end):
    """array[:, first:end]."""
    return block(array, len(array), first, end)


@intrinsic
def part(typing, array, first, end):
    """array[first:end] of a contiguous array of one dimension."""
    kind = types.Array(array.dtype, 1, "C")

    def generate(context, builder, signature, args):
        source, first, end = args
        _, itemsize = _layout(context, builder, array, source)
        at = builder.mul(first, itemsize)
        return _part(context, builder, array, source, at, kind, [builder.sub(end, first)], [itemsize])

    return kind(array, types.intp, types.intp), generate


@njit
def clear(array, first, end):
    """array[:, first:end] = 0."""
    for row in range(len(array)):
        here = piece(array, row, first, end)
        for k in range(here.size):
            here[k] = 0
