"""Numbers as fixed-point digits, so that products with int8 weights are sums of integers, which a GPU has units for.

Widening an int8 weight and multiplying it takes four instructions, with all that is around them six and more, where
memory leaves time for nine at best. As a sum of bytes, d0 + d1 / 128 + d2 / 128^2 + ... times a power of two, a number
times a weight is a few products of bytes, and one instruction takes four of these, or hundreds in the matrix unit. All
sums are exact; what is lost is what lies under the last digit of the largest number: 2^-28 of it with four digits,
2^-21 with three. Infinity and NaN make all NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sandcat.ops.triton.primitives.blocks import PTX

ONE_AND_A_HALF = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 with this added has its nearest integer in the lowest bits."""


@triton.jit
def scale_of_all(x):
    """The power of two that brings all of x to at most 64, and the one that takes it back, which is NaN if x is not
    finite."""
    exponent = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 23
    e = tl.minimum(tl.maximum(exponent, 8), 250)
    back = tl.where(exponent > 250, float("nan"), ((e - 5) << 23).to(tl.float32, bitcast=True))
    return ((259 - e) << 23).to(tl.float32, bitcast=True), back


@triton.jit
def digits(x):
    """Numbers of at most 64 as four digits, each -64 to 64: the bytes of an int32, the first one lowest."""
    first = x + ONE_AND_A_HALF
    rest = (x - (first - ONE_AND_A_HALF)) * 128.0
    second = rest + ONE_AND_A_HALF
    rest = (rest - (second - ONE_AND_A_HALF)) * 128.0
    third = rest + ONE_AND_A_HALF
    fourth = (rest - (third - ONE_AND_A_HALF)) * 128.0 + ONE_AND_A_HALF
    low = (first.to(tl.int32, bitcast=True) & 255) | ((second.to(tl.int32, bitcast=True) & 255) << 8)
    high = (third.to(tl.int32, bitcast=True) & 255) | (fourth.to(tl.int32, bitcast=True) << 8)
    return low | (high << 16)


@triton.jit
def add_four_rows(w0, w1, w2, w3, d0, d1, d2, y0, y1, y2):
    """y + the products of int8 numbers of four rows with those bytes of d that belong to them, a y for every digit."""
    if not PTX:
        y0 += _product(w0, d0, 0) + _product(w1, d0, 1) + _product(w2, d0, 2) + _product(w3, d0, 3)
        y1 += _product(w0, d1, 0) + _product(w1, d1, 1) + _product(w2, d1, 2) + _product(w3, d1, 3)
        y2 += _product(w0, d2, 0) + _product(w1, d2, 1) + _product(w2, d2, 2) + _product(w3, d2, 3)
        return y0, y1, y2
    # four numbers of each row come as one word; the words are turned, so that one holds the four rows' numbers
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d, t;
        prmt.b32 a, $12, $13, 0x5140; prmt.b32 b, $14, $15, 0x5140;
        prmt.b32 c, $12, $13, 0x7362; prmt.b32 d, $14, $15, 0x7362; prmt.b32 t, a, b, 0x5410;
        dp4a.s32.s32 $0, t, $16, $28; dp4a.s32.s32 $4, t, $20, $32; dp4a.s32.s32 $8, t, $24, $36;
        prmt.b32 t, a, b, 0x7632;
        dp4a.s32.s32 $1, t, $17, $29; dp4a.s32.s32 $5, t, $21, $33; dp4a.s32.s32 $9, t, $25, $37;
        prmt.b32 t, c, d, 0x5410;
        dp4a.s32.s32 $2, t, $18, $30; dp4a.s32.s32 $6, t, $22, $34; dp4a.s32.s32 $10, t, $26, $38;
        prmt.b32 t, c, d, 0x7632;
        dp4a.s32.s32 $3, t, $19, $31; dp4a.s32.s32 $7, t, $23, $35; dp4a.s32.s32 $11, t, $27, $39; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [w0, w1, w2, w3, d0, d1, d2, y0, y1, y2], dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def add_four_halves(w0, w1, w2, w3, x0, x1, x2, x3, y):
    """y + the products of e4m3 numbers of four rows with float16, each twice in a word. An instruction makes two
    products, and only sums of four are widened: float16 rounds them by 2^-12, which is less than bfloat16 rounds x."""
    return tl.inline_asm_elementwise(
        """{ .reg .b16 l, h; .reg .b32 p, s, t; .reg .f32 f;
        mov.b32 {l, h}, $4; cvt.rn.f16x2.e4m3x2 s, l; cvt.rn.f16x2.e4m3x2 t, h;
        mul.rn.f16x2 s, s, $8; mul.rn.f16x2 t, t, $8;
        mov.b32 {l, h}, $5; cvt.rn.f16x2.e4m3x2 p, l; fma.rn.f16x2 s, p, $12, s;
        cvt.rn.f16x2.e4m3x2 p, h; fma.rn.f16x2 t, p, $12, t;
        mov.b32 {l, h}, $6; cvt.rn.f16x2.e4m3x2 p, l; fma.rn.f16x2 s, p, $16, s;
        cvt.rn.f16x2.e4m3x2 p, h; fma.rn.f16x2 t, p, $16, t;
        mov.b32 {l, h}, $7; cvt.rn.f16x2.e4m3x2 p, l; fma.rn.f16x2 s, p, $20, s;
        cvt.rn.f16x2.e4m3x2 p, h; fma.rn.f16x2 t, p, $20, t;
        mov.b32 {l, h}, s; cvt.f32.f16 f, l; add.f32 $0, f, $24; cvt.f32.f16 f, h; add.f32 $1, f, $25;
        mov.b32 {l, h}, t; cvt.f32.f16 f, l; add.f32 $2, f, $26; cvt.f32.f16 f, h; add.f32 $3, f, $27; }""",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f", [w0, w1, w2, w3, x0, x1, x2, x3, y],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _product(w, d, BYTE: tl.constexpr):
    return w.to(tl.int32) * ((d << (24 - 8 * BYTE)) >> 24)
