"""The instructions of the processor's matrix unit (Intel AMX), where it has one, and what prepares numbers for it.

A tile is 16 rows of 16 pairs of bfloat16, or of 16 float32 sums. A tile's number is part of an instruction, so that it
must be written out where one is called.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sandcat.ops.numba.primitives.dtypes import widened
from sandcat.ops.numba.primitives.registers import LANES, indices

_i16, _i32 = ir.IntType(16), ir.IntType(32)


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
def configure_tiles(typing, settings, at):
    """Gives all tiles their shapes: 64 bytes at settings[at]."""

    def generate(context, builder, signature, args):
        _call(builder, "ldtilecfg", _place(context, builder, *args, signature.args[0]))
        return context.get_dummy_value()

    return types.none(settings, types.intp), generate


@intrinsic
def release_tiles(typing):
    """Lets go of the tiles, as other libraries expect to find them."""

    def generate(context, builder, signature, args):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic(prefer_literal=True)
def zero_tile(typing, tile):
    """Sets all sums of a tile to 0."""

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


load_tile, store_tile = _moves("tileloadd64"), _moves("tilestored64")


@intrinsic(prefer_literal=True)
def multiply_tiles(typing, total, a, b):
    """total[m, n] += sum over pairs of a[m, pair] . b[pair, n]."""

    def generate(context, builder, signature, args):
        _call(builder, "tdpbf16ps", *map(_number, (total, a, b)))
        return context.get_dummy_value()

    return types.none(total, a, b), generate


def _bfloat16s(context, builder, array, at, kind):
    """2 LANES numbers of an array from `at` on as bfloat16, which they must be: float32, bfloat16 or codes."""
    data = context.make_array(kind)(context, builder, value=array).data
    stored = context.get_data_type(kind.dtype)
    vectors = ir.VectorType(stored, 2 * LANES)
    value = builder.load(builder.bitcast(builder.gep(data, [at]), vectors.as_pointer()))
    value.align = kind.dtype.bitwidth // 8
    if kind.dtype == types.uint16:
        return value
    value = widened(builder, value, kind.dtype, 2 * LANES)
    halves = builder.bitcast(value, ir.VectorType(_i16, 4 * LANES))
    upper = indices(range(1, 4 * LANES, 2))
    return builder.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), upper)


def _store(context, builder, array, at, kind, halves) -> None:
    place = builder.bitcast(_place(context, builder, array, at, kind), halves.type.as_pointer())
    builder.store(halves, place).align = 4


@intrinsic
def store_bfloat16(typing, pairs, to, row, at):
    """pairs[to : to + LANES] = row[at : at + 2 * LANES] as bfloat16, which they are; the row must be contiguous."""

    def generate(context, builder, signature, args):
        halves = _bfloat16s(context, builder, *args[2:], signature.args[2])
        _store(context, builder, *args[:2], signature.args[0], halves)
        return context.get_dummy_value()

    return types.none(pairs, types.intp, row, types.intp), generate


@intrinsic
def store_paired(typing, pairs, to, to_last, low, high, at):
    """pairs[to + i] = (low[at + i], high[at + i]) as bfloat16, which they are, for i up to LANES, and from `to_last` on
    the LANES that follow."""

    def generate(context, builder, signature, args):
        pairs, to, to_last, low, high, at = args
        low, high = (_bfloat16s(context, builder, row, at, signature.args[3]) for row in (low, high))
        for place, first in ((to, 0), (to_last, LANES)):
            lanes = (half for lane in range(first, first + LANES) for half in (lane, 2 * LANES + lane))
            halves = builder.shuffle_vector(low, high, indices(lanes))
            _store(context, builder, pairs, place, signature.args[0], halves)
        return context.get_dummy_value()

    return types.none(pairs, types.intp, types.intp, low, low, types.intp), generate


@intrinsic
def transpose(typing, array, at):
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
            low = indices(lane if not lane & far else LANES + lane - far for lane in range(LANES))
            high = indices(lane + far if not lane & far else LANES + lane for lane in range(LANES))
            for i in (i for i in range(LANES) if not i & far):
                a, b = rows[i], rows[i + far]
                rows[i], rows[i + far] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
        for row, place in zip(rows, places, strict=True):
            builder.store(row, place).align = 4
        return context.get_dummy_value()

    return types.none(array, types.intp), generate
