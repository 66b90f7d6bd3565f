"""What is stored in fewer bits than float32 and widened when it is read: codes of a format, and bfloat16 and float16,
which Numba's CPU target lacks and which are 16-bit integers here."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from sandcat.ops.numba.primitives.float16 import narrow_half, widen_half
from sandcat.ops.weights import Stored

STORAGE = {
    torch.float32: np.dtype(np.float32), torch.bfloat16: np.dtype(np.uint16), torch.float16: np.dtype(np.int16),
}  # fmt: skip
"""How a kernel sees each dtype: the two 16-bit ones are told apart by their sign."""
CODES = {"int8": np.dtype(np.int8), "fp8": np.dtype(np.uint8)}
"""How it sees the codes of each format."""
UNITS = {"fp8": np.float32(256)}
"""What the sums of codes, as `widen` widens them, are to be multiplied with, besides scales; 1 of others."""

_f32, _i32, _i16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def widened(builder, value, stored, lanes: int = 0):
    """LLVM code that makes float32 of a stored number, or of a vector of so many."""

    def kind(scalar):
        return ir.VectorType(scalar, lanes) if lanes else scalar

    if stored == types.uint16:
        sixteen = ir.Constant(kind(_i32), [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(builder.zext(value, kind(_i32)), sixteen), kind(_f32))
    if stored == types.int16:
        return widen_half(builder, value, lanes)
    if stored == types.int8:
        return builder.sitofp(value, kind(_f32))
    if stored == types.uint8:
        return _e4m3(builder, value, lanes)
    return value


def _e4m3(builder, value, lanes: int):
    """e4m3 as float32, divided by 256. A sign, four bits of exponent and three of mantissa, put where float16 has
    these, are the number over 256, for exponent 0 too. (NaN becomes 480: codes are finite.)"""
    kind = ir.VectorType(_i16, lanes) if lanes else _i16

    def constant(number):
        return ir.Constant(kind, [number] * lanes if lanes else number)

    moved = builder.shl(builder.sext(value, kind), constant(7))
    return widen_half(builder, builder.and_(moved, constant(0xBF80 - 0x10000)), lanes)


def storage(format: str, dtype: torch.dtype) -> np.dtype:
    """How a kernel sees a matrix of a format, where activations are of that dtype."""
    return CODES[format] if format in CODES else STORAGE[dtype]


def outputs(total: Tensor, weight: Stored) -> Tensor:
    """Sums of products with codes, [..., O], as outputs of the layer; in float32."""
    if weight.scale is not None:
        total = total * weight.scale
        if weight.format in UNITS:
            total *= float(UNITS[weight.format])
    return total if weight.bias is None else total + weight.bias


def unit_of(format: str) -> np.float32:
    """What sums of a format's codes are to be multiplied with, besides scales."""
    return UNITS.get(format, np.float32(1))


@intrinsic
def widen(typing, stored):
    """A stored number as float32."""

    def generate(context, builder, signature, args):
        return widened(builder, args[0], stored)

    return types.float32(stored), generate


def _near(builder, number):
    """The bfloat16 next to a float32, as float32."""
    bits = builder.bitcast(number, _i32)
    odd = builder.and_(builder.lshr(bits, _i32(16)), _i32(1))
    near = builder.and_(builder.add(builder.add(bits, _i32(0x7FFF)), odd), _i32(0xFFFF0000))
    nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(nan, number, builder.bitcast(near, _f32))


@intrinsic
def rounded(typing, value, like):
    """A float32 rounded to the dtype that `like` is stored in (to nearest, ties to even), as float32 again."""

    def generate(context, builder, signature, args):
        number = args[0]
        if like == types.uint16:
            return _near(builder, number)
        if like == types.int16:
            return widen_half(builder, narrow_half(builder, number))
        return number

    return types.float32(types.float32, like), generate


@intrinsic
def narrow(typing, value, like):
    """A float32 as `like` is stored, rounded as `rounded` does."""

    def generate(context, builder, signature, args):
        number = args[0]
        if like == types.uint16:
            return builder.trunc(builder.lshr(builder.bitcast(_near(builder, number), _i32), _i32(16)), _i16)
        if like == types.int16:
            return narrow_half(builder, number)
        return number

    return like(types.float32, like), generate


@intrinsic
def _two_to(typing, power):
    """2 ** power, of whole powers from -126 to 127."""

    def generate(context, builder, signature, args):
        bits = builder.shl(builder.add(builder.fptosi(args[0], _i32), _i32(127)), _i32(23))
        return builder.bitcast(bits, _f32)

    return types.float32(types.float32), generate


_LOG2_E, _LN_2, _LN_2_REST = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_NEAR = np.float32(12582912)  # 1.5 * 2^23: added and taken off again, it rounds


@njit
def exp(x):
    """e ** x to 1e-7, without a call, so that loops of it are vectorised: 2 ** n times a series for what is left of x.
    What is smaller than a normal number is 0."""
    n = (min(max(x, np.float32(-87.3)), np.float32(88.7)) * _LOG2_E + _NEAR) - _NEAR
    n = min(n, np.float32(127))
    r = (x - n * _LN_2) - n * _LN_2_REST
    series = np.float32(1 / 5040) * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = (series * r + np.float32(1)) * r + np.float32(1)
    y = series * _two_to(n)
    y = np.float32(0) if x < np.float32(-87.3) else y
    return np.float32(np.inf) if x > np.float32(88.72283) else y
