"""What the CUDA kernels have in common: weights and numbers of a layer as they are read, and the list of kept neurons.

Shapes: N outputs, K columns of a weight, I neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.weights import FORMATS

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
PTX = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)
"""Whether kernels may hold instructions of NVIDIA's."""
INT8, FP8 = (tl.constexpr(FORMATS[name].code) for name in ("int8", "fp8"))
_SILU, _GELU, _GELU_TANH = (tl.constexpr(CODES[name]) for name in ("silu", "gelu", "gelu_tanh"))


@triton.jit
def activate(g, CODE: tl.constexpr):
    """The activation of that code, of float32."""
    if CODE == _SILU:
        return g / (1.0 + tl.exp(-g))
    if CODE == _GELU:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    if CODE == _GELU_TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        return 0.5 * g * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    return tl.where(g <= 0, 0.0, g)


@triton.jit
def activated(g, dtype: tl.constexpr, CODE: tl.constexpr):
    """act(g), rounded where the reference rounds."""
    return activate(g.to(dtype).to(tl.float32), CODE).to(dtype).to(tl.float32)


@triton.jit
def gated(g, u, dtype: tl.constexpr, CODE: tl.constexpr):
    """act(g) * u, rounded where the reference rounds."""
    return (activated(g, dtype, CODE) * u).to(dtype).to(tl.float32)


@triton.jit
def halves(w):
    """e4m3 as float16, which holds it exactly: by the instruction for it, or, of bytes, by their bits: put where
    float16 has its exponent and mantissa, they are the number over 256."""
    if w.dtype == tl.uint8:
        bits = w.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    else:
        half = w.to(tl.float16)
    return half


@triton.jit
def as_dtype(w, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Weights in the dtype of activations, which holds the codes of all formats exactly."""
    if FORMAT == FP8:
        w = halves(w)
    return w.to(dtype)


@triton.jit
def widen(w, FORMAT: tl.constexpr):
    """Weights as float32; int8 by its bits, as there are more units for sums than for conversions."""
    if FORMAT != INT8:
        return as_dtype(w, tl.float32, FORMAT)
    if not PTX:
        return (w.to(tl.int32) + 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    return tl.inline_asm_elementwise(
        """{ .reg .b32 u;
        xor.b32 u, $4, 0x80808080;
        prmt.b32 $0, u, 0x4B000000, 0x7540; prmt.b32 $1, u, 0x4B000000, 0x7541;
        prmt.b32 $2, u, 0x4B000000, 0x7542; prmt.b32 $3, u, 0x4B000000, 0x7543;
        add.f32 $0, $0, 0fCB000080; add.f32 $1, $1, 0fCB000080;
        add.f32 $2, $2, 0fCB000080; add.f32 $3, $3, 0fCB000080; }""",
        "=f,=f,=f,=f,r", [w], dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def ask_for(at, here):
    """Asks for the lines of memory at these addresses, where `here`, to be brought to the L2 cache."""
    if PTX:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
            [at.to(tl.int64), here.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def let_in(done, n):
    """Lets the next kernel in once three quarters of n are done: so late that all programs of this one still have their
    places and its own are spread evenly, and early enough that it waits when this one ends."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 a, b;
        shl.b32 a, $1, 2; mul.lo.s32 b, $2, 3; setp.ge.s32 p, a, b;
        @p griddepcontrol.launch_dependents; mov.u32 $0, 0; }""",
        "=r,r,r", [done, n], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def clear(y, count, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """n zeroes; and a counter, where there is one, is zero."""
    if PDL:
        gdc_wait()  # before the next kernel may start: that one reads weights, which must be written by now
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.zeros((BLOCK,), tl.float32), mask=i < n)
    if count is not None:
        tl.store(count, 0, mask=tl.program_id(0) == 0)


@triton.jit
def clear_share(zeros, ZEROS: tl.constexpr):
    """The program's share of `Zeros`, ZEROS at most."""
    if zeros.at is not None:
        i = (tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)) * ZEROS + tl.arange(0, ZEROS)
        tl.store(zeros.at + i, tl.zeros((ZEROS,), tl.float32), mask=i < zeros.n)


@triton.jit
def load_rows(w, rows, N, k, K):
    """Rows of a matrix of N rows and K columns; those beyond its end are zero. Nothing reads them again."""
    here = (rows < N)[:, None] & (k < K)[None, :]
    at = w + rows.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(at, mask=here, other=0.0, eviction_policy="evict_first")


@triton.jit
def finish(total, scale, bias, rows, N):
    """Sums of products as outputs of a layer of N: times their scales, if weights are codes, plus their biases."""
    if scale is not None:
        total *= tl.load(scale + rows, mask=rows < N, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    return total


@triton.jit
def which_of_three(tile, three, sizes, SIZE: tl.constexpr):
    """Which of three, of so many rows or columns, a tile of SIZE of them belongs to, which they are there, and how
    many there are before."""
    at, size, before = three[0], sizes[0], tile * 0
    if tile >= tl.cdiv(sizes[0], SIZE):
        tile -= tl.cdiv(sizes[0], SIZE)
        at, size, before = three[1], sizes[1], sizes[0]
        if tile >= tl.cdiv(sizes[1], SIZE):
            tile -= tl.cdiv(sizes[1], SIZE)
            at, size, before = three[2], sizes[2], sizes[0] + sizes[1]
    return at, size, tile * SIZE + tl.arange(0, SIZE), before


@triton.jit
def append(list_n, count, rows, wanted):
    """Appends the wanted rows to the list; their places in it."""
    base = tl.atomic_add(count, tl.sum(wanted.to(tl.int32)), sem="relaxed")
    place = base + tl.cumsum(wanted.to(tl.int32)) - 1
    tl.store(list_n + place, rows, mask=wanted)
    return place


@triton.jit
def keep_neurons(neurons, rows, a, I):
    """Lists those of I `Neurons` `rows` whose |a| is above its threshold, with a, in the order in which programs come.

    Without a counter it only marks them, at their own places; `in_order` makes the list of that.
    """
    t = tl.load(neurons.threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    wanted = (rows < I) & ~(tl.abs(a) <= t)
    if neurons.counter is None:
        tl.store(neurons.listed + rows, wanted.to(tl.int32), mask=rows < I)
        tl.store(neurons.a + rows, a, mask=rows < I)
    else:
        place = append(neurons.listed, neurons.counter, rows, wanted)
        tl.store(neurons.a + place, a, mask=wanted)
