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
