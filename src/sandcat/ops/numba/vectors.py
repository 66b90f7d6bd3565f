"""Products and sums of rows, in float32 whatever the rows are stored as, sixteen numbers at a time.

Numba's own vectoriser stays far below what memory gives (docs/performance.md), so vectors are written out here: a type
for sixteen float32 and the few operations on it. LLVM makes of them what the machine has: AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

from sandcat.ops.numba.floats import widen, widened

LANES = 16
REORDER = {"reassoc", "contract", "nsz"}
"""The only liberties with arithmetic: the order of sums. NaN and infinity behave as they must."""

_f32 = ir.FloatType()
_vector = ir.VectorType(_f32, LANES)


class Vector(types.Type):
    """`LANES` numbers in float32."""

    def __init__(self):
        super().__init__(name="Vector")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _vector)


def _address(context, builder, array, at, kind):
    """Where LANES numbers of an array begin."""
    data = context.make_array(kind)(context, builder, value=array).data
    stored = context.get_data_type(kind.dtype)
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(stored, LANES).as_pointer()), kind.dtype


@intrinsic
def load(typing, array, at):
    """array[at : at + LANES], widened; the array must be contiguous."""

    def generate(context, builder, signature, args):
        address, stored = _address(context, builder, *args, signature.args[0])
        value = builder.load(address)
        value.align = stored.bitwidth // 8
        return widened(builder, value, stored, LANES)

    return vector(array, types.intp), generate


@intrinsic
def store(typing, array, at, value):
    """array[at : at + LANES] = value; the array must be contiguous float32."""

    def generate(context, builder, signature, args):
        address, stored = _address(context, builder, *args[:2], signature.args[0])
        builder.store(args[2], address).align = stored.bitwidth // 8
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def splat(typing, number):
    """A number in every lane."""

    def generate(context, builder, signature, args):
        one = builder.insert_element(ir.Constant(_vector, ir.Undefined), args[0], ir.IntType(32)(0))
        return builder.shuffle_vector(one, ir.Constant(_vector, ir.Undefined), _mask([0] * LANES))

    return vector(types.float32), generate


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, lane by lane."""

    def generate(context, builder, signature, args):
        a, b, c = args
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return vector(vector, vector, vector), generate


@intrinsic
def total(typing, value):
    """The sum of the lanes, halves first."""

    def generate(context, builder, signature, args):
        (value,) = args
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            empty = ir.Constant(value.type, ir.Undefined)
            low = builder.shuffle_vector(value, empty, _mask(range(lanes)))
            high = builder.shuffle_vector(value, empty, _mask(range(lanes, 2 * lanes)))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float32(vector), generate


def _mask(lanes) -> ir.Constant:
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


@njit(fastmath=REORDER)
def dot(x, row):
    s = splat(np.float32(0))
    whole = x.size // LANES * LANES
    for k in range(0, whole, LANES):
        s = fma(load(x, k), load(row, k), s)
    t = total(s)
    for k in range(whole, x.size):
        t += widen(x[k]) * widen(row[k])
    return t


@njit(fastmath=REORDER)
def dot4(x, row0, row1, row2, row3):
    """Four dots with x: one token with four rows, or one row with four tokens."""
    s0 = s1 = s2 = s3 = splat(np.float32(0))
    whole = x.size // LANES * LANES
    for k in range(0, whole, LANES):
        v = load(x, k)
        s0 = fma(v, load(row0, k), s0)
        s1 = fma(v, load(row1, k), s1)
        s2 = fma(v, load(row2, k), s2)
        s3 = fma(v, load(row3, k), s3)
    t0, t1, t2, t3 = total(s0), total(s1), total(s2), total(s3)
    for k in range(whole, x.size):
        v = widen(x[k])
        t0 += v * widen(row0[k])
        t1 += v * widen(row1[k])
        t2 += v * widen(row2[k])
        t3 += v * widen(row3[k])
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
    """y += h[0] * row0 + h[1] * row1 + h[2] * row2 + h[3] * row3."""
    h0, h1, h2, h3 = splat(h[0]), splat(h[1]), splat(h[2]), splat(h[3])
    whole = y.size // LANES * LANES
    for k in range(0, whole, LANES):
        s = fma(h0, load(row0, k), load(y, k))
        s = fma(h1, load(row1, k), s)
        s = fma(h2, load(row2, k), s)
        store(y, k, fma(h3, load(row3, k), s))
    for k in range(whole, y.size):
        y[k] += h[0] * widen(row0[k]) + h[1] * widen(row1[k]) + h[2] * widen(row2[k]) + h[3] * widen(row3[k])


@njit(fastmath=REORDER)
def add(y, h, row):
    """y += h * row."""
    v = splat(h)
    whole = y.size // LANES * LANES
    for k in range(0, whole, LANES):
        store(y, k, fma(v, load(row, k), load(y, k)))
    for k in range(whole, y.size):
        y[k] += h * widen(row[k])
