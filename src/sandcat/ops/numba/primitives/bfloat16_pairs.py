"""Products and sums of bfloat16 rows by the instruction that multiplies and adds two numbers at once (AVX512_BF16),
where the processor has it: for several tokens, as for one the row takes longer to come from memory than to widen.

The numbers that meet the weights must be bfloat16 too, which activations are; others are left to products in float32.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

from sandcat.ops.numba.primitives.int8_vnni import register, register_at
from sandcat.ops.numba.primitives.processor import HAS_PAIRS
from sandcat.ops.numba.primitives.registers import (
    LANES,
    apart,
    ask_far,
    indices,
    load,
    plus,
    splat,
    store,
    total,
    totals,
    vector,
)

if HAS_PAIRS:
    binding.initialize_native_asmparser()
PAIRED = 2 * LANES
"""Numbers in a register."""
_float_lanes, _register = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_halves = ir.VectorType(ir.IntType(16), PAIRED)


@intrinsic
def add_twos(typing, sums, a, b):
    """sums + the products, two in a lane."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_float_lanes, [_float_lanes, _register, _register])
        return builder.call(ir.InlineAsm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v"), args)

    return vector(vector, register, register), generate


@intrinsic
def interleaved(typing, low, high):
    """The pairs (low[0], high[0]) ... of the first half of two registers, and those of the second."""

    def generate(context, builder, signature, args):
        low, high = (builder.bitcast(value, _halves) for value in args)
        found = []
        for first in (0, LANES):
            lanes = (half for lane in range(first, first + LANES) for half in (lane, PAIRED + lane))
            found.append(builder.bitcast(builder.shuffle_vector(low, high, indices(lanes)), _register))
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(register, 2)(register, register), generate


@intrinsic
def splat_pair(typing, pair):
    """A pair, 32 bits, in every lane."""

    def generate(context, builder, signature, args):
        one = builder.insert_element(ir.Constant(_register, ir.Undefined), args[0], ir.IntType(32)(0))
        zeros = ir.Constant(_register, [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(_register, ir.Undefined), zeros)

    return register(types.int32), generate


@njit
def dot4x4(x0, x1, x2, x3, row0, row1, row2, row3, rows, ahead, out, c):
    """out[t, c + i] = row i . x t, while the four rows that begin at `ahead` in `rows` are asked for one after another:
    processors read ahead of one stream, and not of four."""
    apart()
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = splat(np.float32(0))
    quarter = -(-x0.size // (4 * PAIRED)) * PAIRED
    for i in range(4):
        first, line = i * quarter, ahead[i]
        for k in range(first, min(first + quarter, x0.size), PAIRED):
            for at in range(0, 4 * PAIRED, PAIRED):
                ask_far(rows, line + at)
            line += 4 * PAIRED
            r0, r1, r2, r3 = register_at(row0, k), register_at(row1, k), register_at(row2, k), register_at(row3, k)
            v = register_at(x0, k)
            a0, a1, a2, a3 = add_twos(a0, r0, v), add_twos(a1, r1, v), add_twos(a2, r2, v), add_twos(a3, r3, v)
            v = register_at(x1, k)
            b0, b1, b2, b3 = add_twos(b0, r0, v), add_twos(b1, r1, v), add_twos(b2, r2, v), add_twos(b3, r3, v)
            v = register_at(x2, k)
            c0, c1, c2, c3 = add_twos(c0, r0, v), add_twos(c1, r1, v), add_twos(c2, r2, v), add_twos(c3, r3, v)
            v = register_at(x3, k)
            d0, d1, d2, d3 = add_twos(d0, r0, v), add_twos(d1, r1, v), add_twos(d2, r2, v), add_twos(d3, r3, v)
    out[0, c], out[0, c + 1], out[0, c + 2], out[0, c + 3] = totals(a0, a1, a2, a3)
    out[1, c], out[1, c + 1], out[1, c + 2], out[1, c + 3] = totals(b0, b1, b2, b3)
    out[2, c], out[2, c + 1], out[2, c + 2], out[2, c + 3] = totals(c0, c1, c2, c3)
    out[3, c], out[3, c + 1], out[3, c + 2], out[3, c + 3] = totals(d0, d1, d2, d3)


@njit(inline="always")
def dot1x2(x0, x1, row, out, c):
    """out[t, c] = row . x t."""
    a0 = a1 = b0 = b1 = splat(np.float32(0))
    twos = x0.size // (2 * PAIRED) * (2 * PAIRED)
    for k in range(0, twos, 2 * PAIRED):
        r0, r1 = register_at(row, k), register_at(row, k + PAIRED)
        a0, a1 = add_twos(a0, r0, register_at(x0, k)), add_twos(a1, r1, register_at(x0, k + PAIRED))
        b0, b1 = add_twos(b0, r0, register_at(x1, k)), add_twos(b1, r1, register_at(x1, k + PAIRED))
    if twos < x0.size:
        r0 = register_at(row, twos)
        a0, b0 = add_twos(a0, r0, register_at(x0, twos)), add_twos(b0, r0, register_at(x1, twos))
    out[0, c], out[1, c] = total(plus(a0, a1)), total(plus(b0, b1))


@njit
def add4x2(y0, y1, h0, h1, row0, row1, row2, row3, rows, ahead, first):
    """y t += h t[0] * row0[first:] + ... + h t[3] * row3[first:], of the outputs that fill registers, `h t` being two
    pairs, while the four rows that begin at `ahead` in `rows` are asked for."""
    apart()
    f0, f1, g0, g1 = splat_pair(h0[0]), splat_pair(h0[1]), splat_pair(h1[0]), splat_pair(h1[1])
    for k in range(0, y0.size // PAIRED * PAIRED, PAIRED):
        at = first + k
        for i in range(4):
            ask_far(rows, ahead[i] + at)
        low, high = interleaved(register_at(row0, at), register_at(row1, at))
        low2, high2 = interleaved(register_at(row2, at), register_at(row3, at))
        store(y0, k, add_twos(add_twos(load(y0, k), low, f0), low2, f1))
        store(y0, k + LANES, add_twos(add_twos(load(y0, k + LANES), high, f0), high2, f1))
        store(y1, k, add_twos(add_twos(load(y1, k), low, g0), low2, g1))
        store(y1, k + LANES, add_twos(add_twos(load(y1, k + LANES), high, g0), high2, g1))


@njit
def halve(x, halves):
    """Writes x, float32, as bfloat16; whether each number is one."""
    bits, rest = x.view(np.int32), np.int32(0)
    for k in range(x.size):
        rest |= bits[k] & np.int32(0xFFFF)
        halves[k] = np.uint16(bits[k] >> 16)
    return rest == 0
