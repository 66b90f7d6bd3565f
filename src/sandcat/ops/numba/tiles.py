"""Products of several tokens in bfloat16 by the processor's matrix unit (Intel AMX), where it has one.

A tile is 16 rows of 16 pairs of bfloat16, or of 16 float32 sums. One instruction adds the products of two tiles, so 16
tokens take the time of one. Weights of any layout and of int8 are paired on their way, in a scratch that stays in the
cache: what is stored as bfloat16 or int8 is exact, and so are activations, which are rounded to bfloat16 already.

Shapes: T tokens, C units, I inputs, O outputs, as in vectors.py.
"""

from __future__ import annotations

import ctypes
import platform
import sys

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

from sandcat.ops.numba.floats import widen
from sandcat.ops.numba.lanes import LANES, LINE, ask, load, vector
from sandcat.ops.numba.vectors import add_rows, dot_rows, row_of

PAIRED = 2 * LANES
"""Inputs that one tile takes."""
TILE = LANES * LANES
"""Pairs in a tile, 4 bytes each."""


def _permitted() -> bool:
    """Whether the processor has the unit and Linux lets this process use it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if not binding.get_host_cpu_features().get("amx-bf16"):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


HAS_TILES = _permitted()


def _call(builder, name: str, *args) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    function = builder.module.globals.get(f"llvm.x86.{name}") or ir.Function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, args)


def _place(context, builder, array, at, kind):
    """The address of array[at], as bytes."""
    data = context.make_array(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [at]), ir.IntType(8).as_pointer())


def _number(tile: types.IntegerLiteral) -> ir.Constant:
    return ir.Constant(ir.IntType(8), tile.literal_value)


@intrinsic
def _configure(typing, settings, at):
    """Gives all tiles their shapes: 64 bytes at settings[at]."""

    def generate(context, builder, signature, args):
        _call(builder, "ldtilecfg", _place(context, builder, *args, signature.args[0]))
        return context.get_dummy_value()

    return types.none(settings, types.intp), generate


@intrinsic
def release(typing):
    """Lets go of the tiles, as other libraries expect to find them."""

    def generate(context, builder, signature, args):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic(prefer_literal=True)
def _zero(typing, tile):
    def generate(context, builder, signature, args):
        _call(builder, "tilezero", _number(tile))
        return context.get_dummy_value()

    return types.none(tile), generate


def _moves(name: str):
    """A load or store of a tile whose rows are `stride` bytes apart, from array[at] on."""

    @intrinsic(prefer_literal=True)
    def move(typing, tile, array, at, stride):
        def generate(context, builder, signature, args):
            place = _place(context, builder, args[1], context.cast(builder, args[2], at, types.intp), array)
            _call(builder, name, _number(tile), place, context.cast(builder, args[3], stride, types.int64))
            return context.get_dummy_value()

        return types.none(tile, array, at, stride), generate

    return move


_load, _store = _moves("tileloadd64"), _moves("tilestored64")


@intrinsic(prefer_literal=True)
def _multiply(typing, total, a, b):
    """total[m, n] += sum over pairs of a[m, pair] . b[pair, n]."""

    def generate(context, builder, signature, args):
        _call(builder, "tdpbf16ps", *map(_number, (total, a, b)))
        return context.get_dummy_value()

    return types.none(total, a, b), generate


@intrinsic
def _store_pairs(typing, array, at, low, high):
    """array[at + i] = the pair (low[i], high[i]) as bfloat16, which both are."""

    def generate(context, builder, signature, args):
        whole = ir.VectorType(ir.IntType(32), LANES)
        low, high = (builder.bitcast(value, whole) for value in args[2:])
        low = builder.lshr(low, ir.Constant(whole, [16] * LANES))
        high = builder.and_(high, ir.Constant(whole, [0xFFFF0000] * LANES))
        place = builder.bitcast(_place(context, builder, *args[:2], signature.args[0]), whole.as_pointer())
        builder.store(builder.or_(low, high), place).align = 4
        return context.get_dummy_value()

    return types.none(array, types.intp, vector, vector), generate


def room_of(tokens: int, most: int) -> int:
    """Numbers of 32 bits that a thread needs for products of so many tokens with up to `most` inputs."""
    return 2 * LANES + 8 * TILE + tokens * (-(-most // PAIRED) * LANES)


@njit
def _shape(room, rows_a, columns_b):
    """Tiles 0 to 3 are sums [rows of a, columns of b], 4 and 5 are a, 6 and 7 are b."""
    settings = room[:LANES].view(np.uint8)
    settings[:] = 0
    settings[0] = 1
    widths, rows = settings[16:32].view(np.uint16), settings[48:56]
    for tile in range(8):
        widths[tile] = 4 * LANES if tile in (4, 5) else 4 * columns_b
        rows[tile] = LANES if tile > 5 else rows_a
    _configure(room, 0)


@njit
def dot_rows_tiled(x, rows, units, out, room):
    """`dot_rows` by tiles; `room`: see `room_of`."""
    tokens, count = len(x), out.shape[1]
    blocks, chunks = count // LANES, x.shape[1] // PAIRED
    if blocks and chunks:
        _shape(room, LANES, tokens)
        pairs, packed, sums = room[2 * LANES :], room[2 * LANES + 8 * TILE :], room[2 * LANES + 6 * TILE :]
        _pack_columns(x, chunks, pairs, packed)
        for block in range(blocks):
            first = block * LANES
            ahead = min(first + LANES, count - LANES)
            _zero(0)
            _zero(1)
            for chunk in range(0, chunks - 1, 2):
                _pair_inputs(rows, units, first, ahead, chunk * PAIRED, pairs, 0)
                _pair_inputs(rows, units, first, ahead, (chunk + 1) * PAIRED, pairs, TILE)
                _load(4, pairs, 0, LINE)
                _load(6, packed, chunk * LANES * tokens, 4 * tokens)
                _multiply(0, 4, 6)
                _load(5, pairs, TILE, LINE)
                _load(7, packed, (chunk + 1) * LANES * tokens, 4 * tokens)
                _multiply(1, 5, 7)
            if chunks % 2:
                _pair_inputs(rows, units, first, ahead, (chunks - 1) * PAIRED, pairs, 0)
                _load(4, pairs, 0, LINE)
                _load(6, packed, (chunks - 1) * LANES * tokens, 4 * tokens)
                _multiply(0, 4, 6)
            _store(0, sums, 0, 4 * tokens)
            _store(1, sums, TILE, 4 * tokens)
            found = sums.view(np.float32)
            for r in range(LANES):
                for t in range(tokens):
                    out[t, first + r] = found[r * tokens + t] + found[TILE + r * tokens + t]
        whole = chunks * PAIRED
        if whole < x.shape[1]:
            _add_last_inputs(x, rows, units, whole, out[:, : blocks * LANES])
    else:
        blocks = 0
    rest = blocks * LANES
    if rest < count:
        if units is None:
            dot_rows(x, rows[rest:], None, out[:, rest:])
        else:
            dot_rows(x, rows, units[rest:], out[:, rest:])


@njit
def _pack_columns(x, chunks, pairs, packed):
    """x [T, I] as tiles of pairs [chunk, pair, T]."""
    tokens = len(x)
    for t in range(tokens):
        for chunk in range(chunks):
            at = chunk * PAIRED
            _store_pairs(pairs, 0, load(x[t], at), load(x[t], at + LANES))
            for pair in range(LANES):
                packed[(chunk * LANES + pair) * tokens + t] = pairs[pair]


@njit
def _pair_inputs(rows, units, first, ahead, at, pairs, to):
    """pairs[to:] = 32 inputs of 16 rows; those of the rows ahead are asked for."""
    for r in range(LANES):
        row = rows[row_of(units, first + r)]
        ask(rows[row_of(units, ahead + r)], at)
        _store_pairs(pairs, to + r * LANES, load(row, at), load(row, at + LANES))


@njit
def _add_last_inputs(x, rows, units, whole, out):
    for c in range(out.shape[1]):
        row = rows[row_of(units, c)]
        for t in range(len(x)):
            for k in range(whole, x.shape[1]):
                out[t, c] += x[t, k] * widen(row[k])


BLOCK = 2
AHEAD = BLOCK * PAIRED
"""Tiles of listed rows whose sums stay in the unit: fewer rows are better to ask memory for, more to compute with."""


@njit
def add_rows_tiled(y, h, rows, units, room, first=0):
    """`add_rows` by tiles; `room`: see `room_of`."""
    tokens, count = h.shape
    whole, chunks = y.shape[1] // PAIRED * PAIRED, -(-count // PAIRED)
    if whole:
        _shape(room, tokens, LANES)
        pairs, packed = room[2 * LANES :], room[2 * LANES + 8 * TILE :]
        _pack_rows(h, chunks, pairs, packed)
        stride = y.strides[0]
        for start in range(0, chunks, BLOCK):
            end = min(start + BLOCK, chunks)
            for at in range(0, whole, PAIRED):
                _load(0, y, at, stride)
                _load(1, y, at + LANES, stride)
                for chunk in range(start, end):
                    _pair_outputs(rows, units, count, chunk * PAIRED, first + at, pairs)
                    _load(4, packed, chunk * LANES * tokens, LINE)
                    _load(6, pairs, 0, LINE)
                    _load(7, pairs, TILE, LINE)
                    _multiply(0, 4, 6)
                    _multiply(1, 4, 7)
                _store(0, y, at, stride)
                _store(1, y, at + LANES, stride)
    if whole < y.shape[1]:
        add_rows(y[:, whole:], h, rows, units, first + whole)


@njit
def _pack_rows(h, chunks, pairs, packed):
    """h [T, C] as tiles of pairs [chunk, T, pair], zero after the last."""
    tokens, count = h.shape
    last = np.zeros(PAIRED, np.float32)
    for t in range(tokens):
        for chunk in range(chunks):
            at, to = chunk * PAIRED, (chunk * tokens + t) * LANES
            if at + PAIRED <= count:
                _store_pairs(packed, to, load(h[t], at), load(h[t], at + LANES))
            else:
                for c in range(at, count):
                    last[c - at] = h[t, c]
                _store_pairs(packed, to, load(last, 0), load(last, LANES))


@njit
def _pair_outputs(rows, units, count, c, at, pairs):
    """pairs = 32 outputs of the 32 listed rows from the c-th on, of the last one again after it."""
    for pair in range(LANES):
        low = rows[row_of(units, min(c + pair, count - 1))]
        high = rows[row_of(units, min(c + pair + LANES, count - 1))]
        ask(rows[row_of(units, min(c + pair + AHEAD, count - 1))], at)
        ask(rows[row_of(units, min(c + pair + AHEAD + LANES, count - 1))], at)
        _store_pairs(pairs, pair * LANES, load(low, at), load(high, at))
        _store_pairs(pairs, TILE + pair * LANES, load(low, at + LANES), load(high, at + LANES))
