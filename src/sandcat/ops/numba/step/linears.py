"""The linear layers of a decode step: the lists of inputs that are kept, and the products.

Shapes: B sequences, one token each; weights are read once for all of them. Arrays have R rows: B and, where
products are fastest for four at once, some that stay zero. Each thread computes its share of a matrix's outputs; where
inputs are skipped, it adds up its share of those that are kept, for rows are short and should be read
whole, and the threads' sums are joined in their order (`is_summed`).
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray, njit

from sandcat.ops.numba.primitives import products
from sandcat.ops.numba.primitives.dtypes import widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.matrices import add_inputs, scaled
from sandcat.ops.numba.primitives.memory import block, clear, columns, float32s, numbers, part, piece, pointer
from sandcat.ops.numba.primitives.registers import apart

PAGE = 4096
"""Bytes within which the processor reads ahead: threads that take less of each row would fetch each other's."""


def is_summed(by_inputs: bool, skips: bool, row_bytes: int, threads: int) -> bool:
    """Whether threads share a matrix's inputs, not its outputs, and join their sums: where inputs are skipped, and
    where a thread's part of a row would be short."""
    return by_inputs and (skips or row_bytes < threads * PAGE)


Work = namedtuple("Work", "B thread threads like kept wanted values sums pack room")
"""What a thread works with: how many sequences there are, its number, how many threads there are, an array of the
model's dtype, room for the list of kept units [most], for which are wanted [most] and for their values [R, most], sums
[threads, R, stride], and where the processor's matrix unit is used the function that lays out for it and its room
(rows_amx.py), else 0 and no room."""


@njit(inline="always")
def work_of(model, thread, threads, like):
    """The `Work` of a thread, in the room that a model's record names."""
    R, most = model.rows, model.most
    kept = carray(pointer(model.kept), (threads, most), np.int64)[thread]
    wanted = carray(pointer(model.wanted), (threads, most), np.bool_)[thread]
    values, sums = float32s(model.values, (threads, R, most))[thread], float32s(model.sums, (threads, R, model.stride))
    room = carray(pointer(model.room), (threads, model.tiles), np.int32)[thread]
    return Work(model.sequences, thread, threads, like, kept, wanted, values, sums, model.pack, room)


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
def _pack(x, work):
    if work.pack and work.B > 1:
        products.packed(work.pack, x, work.room)


@njit
def pack(site, x, work):
    """Before the products of layers that are stored by outputs, all with x: lays x out for the matrix unit."""
    _pack(columns(x, 0, site.inputs), work)


@njit
def keep_one(x, threshold, first, end, kept, values):
    """How many of x[first:end] one sequence keeps, after listing them; a NaN is kept."""
    apart()
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
    kept, wanted = work.kept, part(work.wanted, first, end)
    for k in range(end - first):
        wanted[k] = False
    for b in range(work.B):
        x_b, value_b = piece(x, b, first, end), piece(work.values, b, 0, end - first)
        for k in range(end - first):
            keeps = not abs(x_b[k]) <= (widen(threshold[first + k]) if threshold.size else np.float32(0))
            wanted[k] |= keeps
            value_b[k] = x_b[k] if keeps else np.float32(0)
    count = 0
    for k in range(end - first):
        kept[count] = first + k
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
    apart()
    threshold = numbers(site.threshold, (site.inputs if site.threshold else 0,), work.like)
    if work.B == 1:
        row, values = piece(x, 0, 0, site.inputs), piece(work.values, 0, 0, site.inputs)
        count = keep_one(row, threshold, 0, site.inputs, work.kept, values)
    elif site.shared:
        count = list_shared(block(x, work.B, 0, site.inputs), threshold, work.kept)
    else:
        count = keep_any(x, threshold, 0, site.inputs, work)
    first, end = count * work.thread // work.threads, count * (work.thread + 1) // work.threads
    if site.shared:
        _gather(x, first, end, work)
    elif work.B > 1 and count < site.inputs:
        _gather(columns(work.values, 0, site.inputs), first, end, work)
    return first, end


@njit
def _masked(site, x, work):
    """x with what is dropped of it set to 0."""
    apart()
    threshold, size = numbers(site.threshold, (site.inputs,), work.like), site.inputs
    if site.shared:
        count = list_shared(block(x, work.B, 0, site.inputs), threshold, work.kept)
        clear(work.values, 0, size)
        for b in range(work.B):
            for c in range(count):
                k = work.kept[c]
                work.values[b, k] = x[b, k]
    else:
        for b in range(work.B):
            x_b = piece(x, b, 0, size)
            keep_above(x_b, x_b, threshold, piece(work.values, b, 0, size))
    return columns(work.values, 0, size)


@njit
def keep_above(x, score, threshold, y):
    """y = x where |score| is above the threshold, else 0; y may be x."""
    for k in range(y.size):
        y[k] = np.float32(0) if abs(score[k]) <= widen(threshold[k]) else x[k]


@njit
def _by_inputs(site, x, first, y, work):
    apart()
    kept = work.kept
    clear(y, 0, y.shape[1])
    if site.skips:
        at, to = _keep(site, x, work)
        add_inputs(site, y, columns(work.values, at, to), part(kept, at, to), first, work.room)
        return
    if site.masks:
        x = _masked(site, x, work)
    at, to = share(site.inputs, work) if site.summed else (0, site.inputs)
    for k in range(at, to):  # a list of all: code for no list would have to be compiled, too
        kept[k] = k
    add_inputs(site, y, columns(x, at, to), part(kept, at, to), first, work.room)


@njit
def _by_outputs(site, x, first, y, work):
    apart()
    rows = site.weight + first * site.inputs * site.itemsize
    if site.masks:
        masked = _masked(site, x, work)
        _pack(masked, work)
        products.dots(site.dots, masked, rows, work.kept, y, work.room)
        _pack(x, work)  # for the layers after it that have the same x
    else:
        products.dots(site.dots, x, rows, work.kept, y, work.room)


@njit
def begin(site, x, first, end, y, work):
    """y[:, first:end] = those outputs of a linear layer; where it is summed, the thread's sums of what its share of the
    inputs adds to all outputs, and when all threads have theirs `finish` gives y."""
    apart()
    x = columns(x, 0, site.inputs)
    if site.summed:
        at, to, y = 0, site.outputs, columns(work.sums[work.thread], site.sums_at, site.sums_at + site.outputs)
    else:
        at, to = first, end
    if site.by_inputs:
        _by_inputs(site, x, at, columns(y, at, to), work)
    else:
        _by_outputs(site, x, at, columns(y, at, to), work)
    if not site.summed:
        scaled(site, columns(y, first, end), work.B, first, work.like)


@njit
def finish(site, first, end, y, work):
    """y[:, first:end] of a layer that is summed, after `begin` in all threads; of others it is there."""
    apart()
    if not site.summed:
        return
    for b in range(work.B):
        row = piece(y, b, first, end)
        for thread in range(len(work.sums)):
            more = piece(work.sums[thread], b, site.sums_at + first, site.sums_at + end)
            for r in range(row.size):
                row[r] = more[r] if thread == 0 else row[r] + more[r]
    scaled(site, columns(y, first, end), work.B, first, work.like)
