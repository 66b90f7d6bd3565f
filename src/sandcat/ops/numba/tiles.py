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
from sandcat.ops.numba.lanes import LANES, LINE, apart, ask, fma, load, splat, store, vector
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


@intrinsic
def _transpose(typing, array, at):
    """The 16 x 16 numbers of 32 bits from array[at] on, rows for columns, in place."""

    def generate(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(32), LANES)
        step = ir.Constant(ir.IntType(64), LANES)
        places, place = [], args[1]
        for _ in range(LANES):
            places.append(builder.bitcast(_place(context, builder, args[0], place, array), kind.as_pointer()))
            place = builder.add(place, step)
        rows = [builder.load(place) for place in places]
        for row in rows:
            row.align = 4
        for far in (8, 4, 2, 1):
            low = _indices(lane if not lane & far else LANES + lane - far for lane in range(LANES))
            high = _indices(lane + far if not lane & far else LANES + lane for lane in range(LANES))
            for i in (i for i in range(LANES) if not i & far):
                a, b = rows[i], rows[i + far]
                rows[i], rows[i + far] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
        for row, place in zip(rows, places, strict=True):
            builder.store(row, place).align = 4
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


def _indices(lanes) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(lanes))


def room_of(most: int) -> int:
    """Numbers of 32 bits that a thread needs for products of up to 16 tokens with up to `most` inputs."""
    return HEAD + 2 * LANES * -(-most // PAIRED) * LANES


SEGMENT = 128
"""Outputs of a pair of rows that are read in one go: pieces of memory long enough to come fast, and all rows of a tile
side by side still fit the nearest cache."""
AHEAD = 8
"""So many pairs of rows before they are needed they are asked for."""
HEAD = LANES + SEGMENT * LANES


@njit
def _shape(room, tokens):
    """Tiles 0 to 3 are sums, 4 and 5 are first factors, 6 and 7 are second ones; 16 x 16, but as many rows as `tokens`
    where these are the rows."""
    settings = room[:LANES].view(np.uint8)
    settings[:] = 0
    settings[0] = 1
    widths, rows = settings[16:32].view(np.uint16), settings[48:56]
    for tile in range(8):
        widths[tile] = 4 * LANES
        rows[tile] = tokens if tile < 6 else LANES
    _configure(room, 0)


@njit
def dot_rows_tiled(x, rows, units, out, room):
    """`dot_rows` by tiles, after `pack_columns(x, room)`; `room`: see `room_of`."""
    apart()
    count, chunks = out.shape[1], x.shape[1] // PAIRED
    whole = count // LANES * LANES if chunks else 0
    if whole:
        _shape(room, LANES)
        pairs, packed = room[LANES:HEAD], room[HEAD:]
        for first in range(0, whole, LANES):
            ahead = min(first + LANES, whole - LANES)
            _zero(0)
            _zero(1)
            for chunk in range(0, chunks - 1, 2):
                _pair_inputs(rows, units, first, ahead, chunk * PAIRED, pairs, 0)
                _pair_inputs(rows, units, first, ahead, (chunk + 1) * PAIRED, pairs, TILE)
                _load(4, pairs, 0, LINE)
                _load(6, packed, chunk * TILE, LINE)
                _multiply(0, 4, 6)
                _load(5, pairs, TILE, LINE)
                _load(7, packed, (chunk + 1) * TILE, LINE)
                _multiply(1, 5, 7)
            if chunks % 2:
                _pair_inputs(rows, units, first, ahead, (chunks - 1) * PAIRED, pairs, 0)
                _load(4, pairs, 0, LINE)
                _load(6, packed, (chunks - 1) * TILE, LINE)
                _multiply(0, 4, 6)
            _store(0, pairs, 0, LINE)
            _store(1, pairs, TILE, LINE)
            _transpose(pairs, 0)
            _transpose(pairs, TILE)
            found = pairs.view(np.float32)
            one = splat(np.float32(1))
            for t in range(len(x)):
                store(out[t], first, fma(load(found, t * LANES), one, load(found, TILE + t * LANES)))
        _add_last_inputs(x, rows, units, chunks * PAIRED, out[:, :whole])
    if whole < count:
        if units is None:
            dot_rows(x, rows[whole:], None, out[:, whole:])
        else:
            dot_rows(x, rows, units[whole:], out[:, whole:])


@njit
def pack_columns(x, room):
    """Keeps x [T, I] in `room` as tiles of pairs [chunk, pair, token], zero after the last token."""
    apart()
    packed = room[HEAD:]
    for chunk in range(x.shape[1] // PAIRED):
        at, to = chunk * PAIRED, chunk * TILE
        for t in range(len(x)):
            _store_pairs(packed, to + t * LANES, load(x[t], at), load(x[t], at + LANES))
        packed[to + len(x) * LANES : to + TILE] = 0
        _transpose(packed, to)


@njit
def _pair_inputs(rows, units, first, ahead, at, pairs, to):
    """pairs[to:] = 32 inputs of 16 rows; those of the rows ahead are asked for."""
    for r in range(LANES):
        row = rows[row_of(units, first + r)]
        ask(rows[row_of(units, ahead + r)], at)
        _store_pairs(pairs, to + r * LANES, load(row, at), load(row, at + LANES))


@njit
def _add_last_inputs(x, rows, units, first, out):
    """Inputs that fill no tile."""
    if first < x.shape[1]:
        for c in range(out.shape[1]):
            row = rows[row_of(units, c)]
            for t in range(len(x)):
                for k in range(first, x.shape[1]):
                    out[t, c] += x[t, k] * widen(row[k])


@njit
def add_rows_tiled(y, h, rows, units, room, first=0):
    """`add_rows` by tiles; `room`: see `room_of`."""
    apart()
    tokens, count = h.shape
    whole, chunks = y.shape[1] // PAIRED * PAIRED, -(-count // PAIRED)
    if whole and count:
        _shape(room, tokens)
        pairs, packed = room[LANES:HEAD], room[HEAD + (len(room) - HEAD) // 2 :]
        _pack_rows(h, chunks, packed)
        stride = y.strides[0]
        for chunk in range(chunks):
            for at in range(0, whole, SEGMENT):
                to = min(at + SEGMENT, whole)
                _pair_outputs(rows, units, count, chunk * PAIRED, first, at, to, whole, pairs)
                _load(4, packed, chunk * LANES * tokens, LINE)
                for o in range(at, to, PAIRED):
                    _load(0, y, o, stride)
                    _load(1, y, o + LANES, stride)
                    _load(6, pairs, (o - at) * LANES, LINE)
                    _load(7, pairs, (o - at) * LANES + TILE, LINE)
                    _multiply(0, 4, 6)
                    _multiply(1, 4, 7)
                    _store(0, y, o, stride)
                    _store(1, y, o + LANES, stride)
    if whole < y.shape[1]:
        add_rows(y[:, whole:], h, rows, units, first + whole)


@njit
def _pack_rows(h, chunks, packed):
    """h [T, C] as tiles of pairs [chunk, token, pair], zero after the last."""
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
def _pair_outputs(rows, units, count, c, first, at, to, whole, pairs):
    """pairs = those outputs of the 32 listed rows from the c-th on, of the last one again after it."""
    line = LINE // rows.itemsize
    for pair in range(LANES):
        low = rows[row_of(units, min(c + pair, count - 1))]
        high = rows[row_of(units, min(c + pair + LANES, count - 1))]
        n, ask_at = c + pair + AHEAD, at
        if pair + AHEAD >= LANES:
            n -= LANES
            ask_at += SEGMENT
            if ask_at >= whole:
                n += PAIRED
                ask_at = 0
        next_low = rows[row_of(units, min(n, count - 1))]
        next_high = rows[row_of(units, min(n + LANES, count - 1))]
        for o in range(at, to, PAIRED):
            if (o - at) % line == 0:
                ask(next_low, first + ask_at + o - at)
                ask(next_high, first + ask_at + o - at)
            place = (o - at) * LANES + pair * LANES
            _store_pairs(pairs, place, load(low, first + o), load(high, first + o))
            _store_pairs(pairs, place + TILE, load(low, first + o + LANES), load(high, first + o + LANES))
