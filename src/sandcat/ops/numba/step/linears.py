"""The linear layers of a decode step (step.py): tables of them, the lists of inputs that are kept, and the products.

Shapes: B sequences, one token each; weights are read once for all of them. Arrays have R rows: B and, where
products are fastest for four at once, some that stay zero. Each thread computes its share of a matrix's outputs; where
inputs are skipped, it adds up its share of those that are kept, for rows are short and should be read
whole, and the threads' sums are joined in their order (`is_summed`).
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.dtypes import widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.numba.primitives.rows import add_rows, dot_rows
from sandcat.ops.numba.primitives.rows_amx import add_rows_tiled, dot_rows_tiled, pack_columns
from sandcat.ops.numba.primitives.threads import numbers, piece
from sandcat.ops.weights import CODED, FORMATS


def record(integers: str, reals: str = "", **nested: np.dtype) -> np.dtype:
    fields = [(name, np.int64) for name in integers.split()] + [(name, np.float64) for name in reals.split()]
    return np.dtype(fields + list(nested.items()))


LINEAR = record("weight format scale bias threshold by_inputs summed skips masks shared outputs inputs", "unit")
"""A matrix by its addresses and sizes, 0 for what it lacks. It is stored [outputs, inputs], and `by_inputs` [inputs,
outputs]; `format` is a code of `FORMATS`, and `unit` that of `unit_of`. Where it `skips`, which needs a weight stored
by inputs, those that are not above their threshold, or 0 if there is none, are not read; where it `masks`, they are
read, and count as 0. Several sequences use one list of them if `shared` (see ops/shared_units.py). `summed`: each
thread adds up its share of the inputs, see `is_summed`."""

PAGE = 4096
"""Bytes within which the processor reads ahead: threads that take less of each row would fetch each other's."""


def is_summed(by_inputs: bool, skips: bool, row_bytes: int, threads: int) -> bool:
    """Whether threads share a matrix's inputs, not its outputs, and join their sums: where inputs are skipped, and
    where a thread's part of a row would be short."""
    return by_inputs and (skips or row_bytes < threads * PAGE)


Work = namedtuple("Work", "B thread threads like codes kept wanted values sums room")
"""What a thread works with: how many sequences there are, its number, how many threads there are, an array of the
model's dtype, one like the codes of each format that the model has (else None), in the order of `CODED`, room for the
list of kept units, for which are wanted and for their values [R, most], sums [threads, R, ...], and where the
processor's matrix unit is used its room (rows_amx.py), else None."""

UNIT = 16
"""Outputs that no two threads share: a cache line of float32."""
NEARLY_ALL = 0.9
"""Above this share of units that any sequence keeps all are read: making the list costs more than it saves."""


@njit
def share(size, work):
    """Which outputs are this thread's."""
    units = -(-size // UNIT)
    first, end = units * work.thread // work.threads, units * (work.thread + 1) // work.threads
    return min(size, first * UNIT), min(size, end * UNIT)


@njit
def _dot_rows(x, rows, units, out, room):
    if room is None:
        dot_rows(x, rows, units, out)
    else:
        dot_rows_tiled(x, rows, units, out, room)


@njit
def _add_rows(y, h, rows, units, room, first):
    if room is None:
        add_rows(y, h, rows, units, first)
    else:
        add_rows_tiled(y, h, rows, units, room, first)


@njit
def _pack(x, room):
    if room is not None and len(x) > 1:
        pack_columns(x, room)


@njit
def pack(site, x, work):
    """Before the products of layers that are stored by outputs, all with x: lays x out for the matrix unit."""
    _pack(x[:, : site.inputs], work.room)


def _by_format(multiply):
    """`multiply(site, x, rest, work, like)` as a function without `like`, which is what the site's weight is like."""

    @njit
    def of_numbers(site, x, rest, work):
        multiply(site, x, rest, work, work.like)

    run = of_numbers
    for place, name in enumerate(CODED):
        run = _or_of(multiply, FORMATS[name].code, place, run)
    return run


def _or_of(multiply, format, place, otherwise):
    @njit
    def of_codes(site, x, rest, work, like):
        if like is not None:
            multiply(site, x, rest, work, like)

    @njit
    def run(site, x, rest, work):
        if site.format == format:
            of_codes(site, x, rest, work, work.codes[place])
        else:
            otherwise(site, x, rest, work)

    return run


@njit
def _scales(site, like):
    return numbers(site.scale, (site.outputs if site.scale else 0,), like)


@njit
def _biases(site, like):
    return numbers(site.bias, (site.outputs if site.bias else 0,), like)


@njit
def _finish(site, first, end, y, work):
    """The scales of codes, and the bias."""
    unit = np.float32(site.unit)
    scale, bias = _scales(site, work.like)[first:end], _biases(site, work.like)[first:end]
    for b in range(work.B):
        row = piece(y, b, first, end)
        if scale.size:
            for r in range(row.size):
                row[r] *= widen(scale[r]) * unit
        if bias.size:
            for r in range(row.size):
                row[r] += widen(bias[r])


@njit
def keep_one(x, threshold, first, end, kept, values):
    """How many of x[first:end] one sequence keeps, after listing them; a NaN is kept."""
    count = 0
    for k in range(first, end):
        kept[count] = k
        values[count] = x[k]
        count += not abs(x[k]) <= (widen(threshold[k]) if threshold.size else np.float32(0))
    return count


@njit
def keep_any(x, threshold, first, end, work):
    """The same for several sequences: how many any of them keeps. For those that do not keep one, its value is 0;
    values stand at the places of their units, for `gather`."""
    apart()
    kept, wanted = work.kept, work.wanted
    wanted[first:end] = False
    for b in range(work.B):
        x_b, value_b = x[b], work.values[b]
        for k in range(first, end):
            keeps = not abs(x_b[k]) <= (widen(threshold[k]) if threshold.size else np.float32(0))
            wanted[k] |= keeps
            value_b[k - first] = x_b[k] if keeps else np.float32(0)
    count = 0
    for k in range(first, end):
        kept[count] = k
        count += wanted[k]
    if count >= NEARLY_ALL * (end - first):
        count = end - first
        for k in range(count):
            kept[k] = first + k
    return count


@njit
def _gather(x, first, end, work):
    """values[:, first:end] = x of the units listed there; x may be `values`, as no unit stands before its place."""
    for b in range(work.B):
        for c in range(first, end):
            work.values[b, c] = x[b, work.kept[c]]


@njit
def _keep(site, x, work):
    """Lists the inputs that are kept; the part of the list that is this thread's, with its values."""
    threshold = numbers(site.threshold, (site.inputs if site.threshold else 0,), work.like)
    if work.B == 1:
        count = keep_one(x[0], threshold, 0, site.inputs, work.kept, work.values[0])
    elif site.shared:
        count = list_shared(x[: work.B], threshold, work.kept)
    else:
        count = keep_any(x, threshold, 0, site.inputs, work)
    first, end = count * work.thread // work.threads, count * (work.thread + 1) // work.threads
    if site.shared:
        _gather(x, first, end, work)
    elif work.B > 1 and count < site.inputs:
        _gather(work.values, first, end, work)
    return slice(first, end)


@njit
def _masked(site, x, work):
    """x with what is dropped of it set to 0."""
    threshold, size = numbers(site.threshold, (site.inputs,), work.like), site.inputs
    if site.shared:
        count = list_shared(x[: work.B], threshold, work.kept)
        work.values[: work.B, :size] = 0
        for b in range(work.B):
            for c in range(count):
                k = work.kept[c]
                work.values[b, k] = x[b, k]
    else:
        for b in range(work.B):
            x_b = piece(x, b, 0, size)
            keep_above(x_b, x_b, threshold, work.values[b, :size])
    return work.values[:, :size]


@njit
def keep_above(x, score, threshold, y):
    """y = x where |score| is above the threshold, else 0; y may be x."""
    for k in range(y.size):
        y[k] = np.float32(0) if abs(score[k]) <= widen(threshold[k]) else x[k]


@njit
def _by_inputs(site, x, first, y, work, like):
    rows, kept = numbers(site.weight, (site.inputs, site.outputs), like), work.kept
    y[:] = 0
    if site.skips:
        mine = _keep(site, x, work)
        _add_rows(y, work.values[:, mine], rows, kept[mine], work.room, first)
        return
    if site.masks:
        x = _masked(site, x, work)
    at, to = share(site.inputs, work) if site.summed else (0, site.inputs)
    for k in range(at, to):  # a list of all: code for no list would have to be compiled, too
        kept[k] = k
    _add_rows(y, x[:, at:to], rows, kept[at:to], work.room, first)


@njit
def _multiplied(site, x, rest, work, like):
    first, end, at, y = rest
    if site.by_inputs:
        if site.summed:
            first, y = 0, work.sums[work.thread, :, at : at + site.outputs]
        else:
            y = y[:, first:end]
        _by_inputs(site, x, first, y, work, like)
    else:
        rows = numbers(site.weight, (site.outputs, site.inputs), like)
        used = x
        if site.masks:
            used = _masked(site, x, work)
            _pack(used, work.room)
        _dot_rows(used, rows[first:end], None, y[:, first:end], work.room)
        if site.masks:
            _pack(x, work.room)  # for the layers after it that have the same x


_begin = _by_format(_multiplied)


@njit
def begin(site, x, first, end, y, at, work):
    """y[:, first:end] = those outputs of a linear layer; where it is summed, the thread's sums from `at` on of what its
    share of the inputs adds to all outputs, and when all threads have theirs `finish` gives y."""
    apart()
    x = x[:, : site.inputs]
    _begin(site, x, (first, end, at, y), work)
    if not site.summed:
        _finish(site, first, end, y, work)


@njit
def finish(site, first, end, y, at, work):
    """y[:, first:end] of a layer that is summed, after `begin` in all threads; of others it is there."""
    apart()
    if site.summed:
        sums = work.sums
        for b in range(work.B):
            row = piece(y, b, first, end)
            row[:] = sums[0, b, at + first : at + end]
            for thread in range(1, len(sums)):
                more = sums[thread, b, at + first : at + end]
                for r in range(row.size):
                    row[r] += more[r]
        _finish(site, first, end, y, work)


@njit
def _listed_outputs(site, x, rest, work, like):
    kept, values = rest
    rows = numbers(site.weight, (site.outputs, site.inputs), like)
    _dot_rows(x, rows, kept, values, work.room)


_outputs_of = _by_format(_listed_outputs)


@njit
def listed_outputs(site, x, count, values, work):
    """values[:, c] = output kept[c] of a layer that is stored by outputs."""
    apart()
    x, kept, values = x[:, : site.inputs], work.kept[:count], values[:, :count]
    _outputs_of(site, x, (kept, values), work)
    unit = np.float32(site.unit)
    scale, bias = _scales(site, work.like), _biases(site, work.like)
    for b in range(work.B):
        for c in range(count):
            if scale.size:
                values[b, c] *= widen(scale[kept[c]]) * unit
            if bias.size:
                values[b, c] += widen(bias[kept[c]])
