"""float16 as float32 and back, of numbers and of vectors: by the processor's instructions, and by its bits where it has
none (x86 before F16C), where LLVM would call functions that are not there."""

from __future__ import annotations

from llvmlite import ir

from sandcat.ops.numba.primitives.processor import HAS_HALF

_f32, _i32, _i16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_MANTISSA, _HIDDEN = 13, 112 << 23
"""How many more bits float32 has for the fraction, and how much larger its exponents are, where they stand."""


def widen_half(builder, value, lanes: int = 0):
    """LLVM code that makes float32 of the bits of float16, or of a vector of so many."""

    def kind(scalar):
        return ir.VectorType(scalar, lanes) if lanes else scalar

    def constant(scalar, number):
        return ir.Constant(kind(scalar), [number] * lanes if lanes else number)

    if HAS_HALF:
        return builder.fpext(builder.bitcast(value, kind(ir.HalfType())), kind(_f32))
    bits = builder.zext(value, kind(_i32))
    size = builder.and_(bits, constant(_i32, 0x7FFF))
    normal = builder.add(builder.shl(size, constant(_i32, _MANTISSA)), constant(_i32, _HIDDEN))
    above = builder.add(normal, constant(_i32, _HIDDEN))  # an infinity, or a NaN
    below = builder.bitcast(builder.fmul(builder.sitofp(size, kind(_f32)), constant(_f32, 2.0**-24)), kind(_i32))
    found = builder.select(builder.icmp_unsigned("<", size, constant(_i32, 0x7C00)), normal, above)
    found = builder.select(builder.icmp_unsigned("<", size, constant(_i32, 0x0400)), below, found)
    sign = builder.shl(builder.and_(bits, constant(_i32, 0x8000)), constant(_i32, 16))
    return builder.bitcast(builder.or_(found, sign), kind(_f32))


def narrow_half(builder, number):
    """The bits of the float16 next to a float32 (ties to even), an i16."""
    if HAS_HALF:
        return builder.bitcast(builder.fptrunc(number, ir.HalfType()), _i16)
    bits = builder.bitcast(number, _i32)
    size = builder.and_(bits, _i32(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, _i32(_MANTISSA)), _i32(1))
    near = builder.add(builder.add(size, _i32((1 << _MANTISSA - 1) - 1)), odd)
    normal = builder.lshr(builder.sub(near, _i32(_HIDDEN)), _i32(_MANTISSA))
    infinity = _i32(0x7C00)
    normal = builder.select(builder.icmp_unsigned("<", normal, infinity), normal, infinity)
    half = ir.Constant(_f32, 0.5)  # its last bit is the smallest float16: added, it rounds to a multiple of that
    below = builder.sub(
        builder.bitcast(builder.fadd(builder.bitcast(size, _f32), half), _i32), builder.bitcast(half, _i32)
    )
    found = builder.select(builder.icmp_unsigned("<", size, _i32(0x38800000)), below, normal)
    found = builder.select(builder.icmp_unsigned(">", size, _i32(0x7F800000)), _i32(0x7E00), found)
    sign = builder.and_(builder.lshr(bits, _i32(16)), _i32(0x8000))
    return builder.trunc(builder.or_(found, sign), _i16)
