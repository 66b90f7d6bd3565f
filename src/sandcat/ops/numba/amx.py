"""The instructions of the processor's matrix unit (Intel AMX), where it has one, and what prepares numbers for it.

A tile is 16 rows of 16 pairs of bfloat16, or of 16 float32 sums. A tile's number is part of an instruction, so that it
must be written out where one is called.
"""

from __future__ import annotations

import ctypes
import platform
import sys

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from sandcat.ops.numba.lanes import LANES, vector


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


@intrinsic
def store_pairs(typing, array, at, low, high):
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
