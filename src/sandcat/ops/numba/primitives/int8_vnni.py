"""Products of int8 rows by the instruction that multiplies and adds four bytes at once (AVX512_VNNI), where the
processor has it: widening and multiplying sixteen weights takes three instructions, and these take five for 64.

The numbers that meet the weights are written as fixed-point digits, as on a GPU (triton/primitives/fixed_point.py): x =
d0 + d1 / 128 + d2 / 128^2 times a power of two, digits -64 to 64. Sums of products are exact; what is lost is under
2^-21 of the largest number, so numbers that are no bfloat16 are left to products in float32.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

from sandcat.ops.numba.primitives.processor import HAS_FOURS
from sandcat.ops.numba.primitives.registers import LANES, fma, splat, vector

if HAS_FOURS:
    binding.initialize_native_asmparser()
WIDTH = 4 * LANES
"""Bytes in a register."""
_register = ir.VectorType(ir.IntType(32), LANES)


class Bytes(types.Type):
    """A register of int8 numbers, or of int32 sums of their products."""

    def __init__(self):
        super().__init__(name="Bytes")


register = Bytes()


@register_model(Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _register)


@intrinsic
def register_at(typing, array, at):
    """WIDTH bytes of a contiguous array, from array[at] on."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        value = builder.load(builder.bitcast(builder.gep(data, [args[1]]), _register.as_pointer()))
        value.align = 1
        return value

    return register(array, types.intp), generate


@intrinsic
def shifted(typing, value):
    """Every number plus 128, as an unsigned one: the instruction wants one factor so."""

    def generate(context, builder, signature, args):
        return builder.xor(args[0], ir.Constant(_register, [0x80808080] * LANES))

    return register(register), generate


@intrinsic
def add_fours(typing, sums, unsigned, signed):
    """sums + the products, four in a lane."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_register, [_register] * 3)
        return builder.call(ir.InlineAsm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v"), args)

    return register(register, register, register), generate


@intrinsic
def nothing(typing):
    """Sums of nothing."""

    def generate(context, builder, signature, args):
        return ir.Constant(_register, [0] * LANES)

    return register(), generate


@intrinsic
def as_floats(typing, sums):
    """Sixteen int32 sums as float32."""

    def generate(context, builder, signature, args):
        return builder.sitofp(args[0], ir.VectorType(ir.FloatType(), LANES))

    return vector(register), generate


@njit
def split(x, digits):
    """Writes the three digits of K numbers, int8 [3, K]. What sums of them are to be multiplied with; and what is in
    such sums beside the products, as weights are shifted. The first is NaN if a number is not finite or no bfloat16."""
    bits, top, rest = x.view(np.int32), np.int32(0), np.int32(0)
    for k in range(x.size):
        top = max(top, bits[k] & np.int32(0x7FFFFFFF))
        rest |= bits[k] & np.int32(0xFFFF)
    exponent = top >> 23
    if exponent > 250 or rest != 0:
        return np.float32(np.nan), np.float32(0)
    powers = np.empty(2, np.int32)
    e = max(exponent, 8)
    powers[0], powers[1] = (259 - e) << 23, (e - 5) << 23
    there, back = powers.view(np.float32)
    near, shift = np.float32(12582912), np.float32(128)  # 1.5 * 2^23: added and taken off again, it rounds
    d0, d1, d2 = digits
    s0 = s1 = s2 = np.int32(0)
    for k in range(x.size):
        number = x[k] * there
        first = (number + near) - near
        number = (number - first) * shift
        second = (number + near) - near
        third = ((number - second) * shift + near) - near
        d0[k], d1[k], d2[k] = np.int8(first), np.int8(second), np.int8(third)
        s0 += np.int32(first)
        s1 += np.int32(second)
        s2 += np.int32(third)
    return back, shift * (np.float32(s0) + (np.float32(s1) + np.float32(s2) / shift) / shift)


@njit(inline="always")
def sums_of_fours(d0, d1, d2, row):
    """A register whose lanes add up to the product of the digits with a row of int8, and what is in it beside that."""
    a0 = a1 = a2 = nothing()
    for k in range(0, d0.size, WIDTH):
        w = shifted(register_at(row, k))
        a0 = add_fours(a0, w, register_at(d0, k))
        a1 = add_fours(a1, w, register_at(d1, k))
        a2 = add_fours(a2, w, register_at(d2, k))
    next_digit = splat(np.float32(2**-7))
    return fma(fma(as_floats(a2), next_digit, as_floats(a1)), next_digit, as_floats(a0))
