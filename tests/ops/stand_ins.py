"""Stand-ins for instructions that this processor lacks, so that what is written for them can run: tiles (AMX), pairs of
bfloat16 (AVX512_BF16), fours of int8 (AVX512_VNNI). Slow, and the sums are rounded where the instruction rounds.

`install` comes before kernels are imported; none of what they compile may be cached on disk.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from sandcat.ops.numba.primitives import processor
from sandcat.ops.numba.primitives.dtypes import widen
from sandcat.ops.numba.primitives.memory import pointer
from sandcat.ops.numba.primitives.registers import LANES, vector

FLAGS = {
    "tiles": {"HAS_TILES": True},
    "pairs": {"ONE_BY_ONE": True, "HAS_PAIRS": True, "HAS_FOURS": True},
    "fours": {"ONE_BY_ONE": True, "HAS_FOURS": True},
}
"""What kernels then think of the processor."""

_TILES, _ROWS, _THREADS = 8, 16, 64
_SIZE = _TILES * (_ROWS * LANES + 1)
_room = np.zeros((_THREADS, _SIZE), np.int32)
_ADDRESS = _room.ctypes.data
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())


def install(kind: str) -> None:
    for flag, value in FLAGS[kind].items():
        setattr(processor, flag, value)
    from sandcat.ops.numba.primitives import amx, bfloat16_pairs, int8_vnni

    if kind == "tiles":
        for name, function in TILES.items():
            setattr(amx, name, function)
    else:
        int8_vnni.add_fours = _add_fours(int8_vnni.register)
        bfloat16_pairs.add_twos = _add_twos(int8_vnni.register)


def _lanes(builder, value, bits: int, shift: str) -> ir.Value:
    """Every lane shifted, by `shl`, `lshr` or `ashr`."""
    return getattr(builder, shift)(value, ir.Constant(value.type, [bits] * LANES))


def _add_twos(register):
    @intrinsic
    def add_twos(typing, sums, a, b):
        def generate(context, builder, signature, args):
            total, *pairs = args
            for halve in (lambda pair: _lanes(builder, _lanes(builder, pair, 16, "lshr"), 16, "shl"),
                          lambda pair: _lanes(builder, pair, 16, "shl")):  # fmt: skip
                a, b = (builder.bitcast(halve(pair), total.type) for pair in pairs)
                total = builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))
            return total

        return vector(vector, register, register), generate

    return add_twos


def _add_fours(register):
    @intrinsic
    def add_fours(typing, sums, unsigned, signed):
        def generate(context, builder, signature, args):
            total, unsigned, signed = args
            for left in (24, 16, 8, 0):
                a = _lanes(builder, _lanes(builder, unsigned, left, "shl"), 24, "lshr")
                b = _lanes(builder, _lanes(builder, signed, left, "shl"), 24, "ashr")
                total = builder.add(total, builder.mul(a, b))
            return total

        return register(register, register, register), generate

    return add_fours


def _outside(*kinds):
    """A function that is compiled once, and not again in everything that calls it."""

    def made(body):
        compiled, name = cfunc(types.void(*kinds))(body), f"stand_in{body.__name__}"
        binding.add_symbol(name, compiled.address)
        _held.append(compiled)
        return types.ExternalFunction(name, types.void(*kinds))

    return made


_held: list = []
_room_here = njit(lambda: _ADDRESS + np.int64(_thread()) * _SIZE * 4)


@njit
def _tile(number):
    """A tile of the calling thread, as many rows as it has; how many these are stands after all tiles."""
    at = _room_here()
    count = carray(pointer(at + _TILES * _ROWS * LANES * 4), (_TILES,), np.int32)[number]
    return carray(pointer(at + number * _ROWS * LANES * 4), (count, LANES), np.int32)


@_outside(types.intp)
def _configure(settings):
    rows = carray(pointer(_room_here() + _TILES * _ROWS * LANES * 4), (_TILES,), np.int32)
    wanted = carray(pointer(settings + 48), (_TILES,), np.uint8)
    for tile in range(_TILES):
        rows[tile] = wanted[tile]


@_outside(types.intp)
def _zero(tile):
    _tile(tile)[:] = 0


@_outside(types.intp, types.intp, types.intp, types.boolean)
def _move(tile, at, stride, store):
    rows = _tile(tile)
    for r in range(len(rows)):
        row = carray(pointer(at + r * stride), (LANES,), np.int32)
        for pair in range(LANES):
            if store:
                row[pair] = rows[r, pair]
            else:
                rows[r, pair] = row[pair]


@njit
def _of(pair, high):
    """One of two bfloat16."""
    return np.float64(widen(np.uint16((pair >> 16 if high else pair) & 0xFFFF)))


@_outside(types.intp, types.intp, types.intp)
def _multiply(total, a, b):
    sums, rows, columns = _tile(total).view(np.float32), _tile(a), _tile(b)
    for m in range(len(sums)):
        for n in range(LANES):
            low = high = np.float32(0)
            for k in range(len(columns)):
                low = np.float32(low + _of(rows[m, k], False) * _of(columns[k, n], False))
                high = np.float32(high + _of(rows[m, k], True) * _of(columns[k, n], True))
            sums[m, n] += low + high


@njit
def _place(array, at):
    return array.ctypes.data + at * array.itemsize


TILES = {
    "configure_tiles": njit(lambda settings, at: _configure(_place(settings, at))),
    "release_tiles": njit(lambda: None),
    "zero_tile": njit(lambda tile: _zero(tile)),
    "load_tile": njit(lambda tile, array, at, stride: _move(tile, _place(array, at), stride, False)),
    "store_tile": njit(lambda tile, array, at, stride: _move(tile, _place(array, at), stride, True)),
    "multiply_tiles": njit(lambda total, a, b: _multiply(total, a, b)),
}
