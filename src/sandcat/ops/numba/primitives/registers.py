"""Sixteen numbers at a time, in float32 whatever they are stored as.

Vectors are written out, so that what is asked of memory can stand between them (docs/performance.md): a type for
sixteen float32 and the few operations on it. LLVM makes of them what the machine has: AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from sandcat.ops.numba.primitives.dtypes import widened

LANES = 16
LINE = 64
"""Bytes that come from memory at once."""

_f32 = ir.FloatType()
_vector = ir.VectorType(_f32, LANES)


class Vector(types.Type):
    """`LANES` numbers in float32."""

    def __init__(self):
        super().__init__(name="Vector")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _vector)


def _address(context, builder, array, at, kind):
    """Where LANES numbers of an array begin."""
    data = context.make_array(kind)(context, builder, value=array).data
    stored = context.get_data_type(kind.dtype)
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(stored, LANES).as_pointer()), kind.dtype


@intrinsic
def load(typing, array, at):
    """array[at : at + LANES], widened; the array must be contiguous."""

    def generate(context, builder, signature, args):
        address, stored = _address(context, builder, *args, signature.args[0])
        value = builder.load(address)
        value.align = stored.bitwidth // 8
        return widened(builder, value, stored, LANES)

    return vector(array, types.intp), generate


@intrinsic
def store(typing, array, at, value):
    """array[at : at + LANES] = value; the array must be contiguous float32."""

    def generate(context, builder, signature, args):
        address, stored = _address(context, builder, *args[:2], signature.args[0])
        builder.store(args[2], address).align = stored.bitwidth // 8
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def splat(typing, number):
    """A number in every lane."""

    def generate(context, builder, signature, args):
        one = builder.insert_element(ir.Constant(_vector, ir.Undefined), args[0], ir.IntType(32)(0))
        return builder.shuffle_vector(one, ir.Constant(_vector, ir.Undefined), indices([0] * LANES))

    return vector(types.float32), generate


@intrinsic
def fma(typing, a, b, c):
    """a * b + c, lane by lane."""

    def generate(context, builder, signature, args):
        a, b, c = args
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    return vector(vector, vector, vector), generate


@intrinsic
def plus(typing, a, b):
    """a + b, lane by lane."""

    def generate(context, builder, signature, args):
        return builder.fadd(*args)

    return vector(vector, vector), generate


@intrinsic
def total(typing, value):
    """The sum of the lanes, halves first."""

    def generate(context, builder, signature, args):
        (value,) = args
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            empty = ir.Constant(value.type, ir.Undefined)
            low = builder.shuffle_vector(value, empty, indices(range(lanes)))
            high = builder.shuffle_vector(value, empty, indices(range(lanes, 2 * lanes)))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float32(vector), generate


@intrinsic
def totals(typing, a, b, c, d):
    """The sums of the lanes of four vectors; together they take less than four times `total`."""

    def generate(context, builder, signature, args):
        def added(value, other, ours):
            """The sum of two shuffles of both; in every four lanes: those that `ours` names, of value and other."""
            picks = [
                [quad + i if i < 4 else LANES + quad + i - 4 for quad in range(0, LANES, 4) for i in pick]
                for pick in ours
            ]
            return builder.fadd(*(builder.shuffle_vector(value, other, indices(pick)) for pick in picks))

        pairs = ((0, 4, 1, 5), (2, 6, 3, 7))  # a b a b
        value = added(added(*args[:2], pairs), added(*args[2:], pairs), ((0, 1, 4, 5), (2, 3, 6, 7)))  # a b c d
        for lanes in (LANES // 2, LANES // 4):
            empty = ir.Constant(value.type, ir.Undefined)
            halves = (builder.shuffle_vector(value, empty, indices(range(at, at + lanes))) for at in (0, lanes))
            value = builder.fadd(*halves)
        numbers = [builder.extract_element(value, ir.IntType(32)(i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(types.float32, 4)(vector, vector, vector, vector), generate


def indices(lanes) -> ir.Constant:
    """Which lanes a shuffle takes."""
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def _asks(nearness: int):
    """Asks for the line of memory at array[at], which the array need not reach; nothing waits for it."""

    @intrinsic
    def ask(typing, array, at):
        def generate(context, builder, signature, args):
            data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
            byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
            prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            read, is_data = i32(0), i32(1)
            builder.call(prefetch, [builder.bitcast(builder.gep(data, [args[1]]), byte), read, i32(nearness), is_data])
            return context.get_dummy_value()

        return types.none(array, types.intp), generate

    return ask


ask, ask_far = _asks(3), _asks(1)
"""To the nearest cache, and to a farther one, which has room for more that is on its way."""


@intrinsic
def apart(typing):
    """Keeps the function that calls this a function of its own, instead of a copy at every call: a large one would take
    long to compile."""

    def generate(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), generate
