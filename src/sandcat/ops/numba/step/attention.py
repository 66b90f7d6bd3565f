"""Attention of one decode step on a CPU, over pages: what there is of all sequences and key-value heads is laid end to
end, and each thread takes an equal part of that, whatever the lengths.

Shapes: B sequences, one token each, N key-value heads, D size of a head, G query heads a key-value head. `op.cached` is
a `JOB` with the addresses of the pages, without those of rows.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from sandcat.ops.numba.paged_attention import ITEM, POSITIONS, address_of, attend_part, join, part_of
from sandcat.ops.numba.primitives.attention import rotate
from sandcat.ops.numba.primitives.dtypes import narrow, rounded
from sandcat.ops.numba.primitives.memory import float32s, numbers, piece, pointer
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.numba.primitives.rows import norm
from sandcat.ops.numba.step.barrier import barrier


@njit
def _head(values, weight, eps, cos, sin, out, like):
    """A query or key head: RMSNorm where there is one, then the rotary embedding, rounded as transformers rounds."""
    if weight:
        norm(values, numbers(weight, (values.size,), like), eps, out)
    else:
        for d in range(out.size):
            out[d] = values[d]
    rotate(out, cos, sin)


@njit
def list_heads(cached, lengths, items):
    """Fills the list of items, each the one row of a sequence and a key-value head; how many keys there are in all."""
    total, starts = 0, carray(pointer(cached.start), (len(lengths), cached.N), np.int32)
    for i in range(cached.items):
        item = items[i]
        item.b, item.n, item.row, item.rows = i // cached.N, i % cached.N, i // cached.N, 1
        item.own = lengths[item.b]
        item.first, item.end = max(0, item.own + 1 - cached.window), item.own + 1
        if cached.start:
            item.first = max(item.first, starts[item.b, item.n])
        item.before = total
        total += item.end - item.first
    return total


@njit
def _write(cached, item, k, v, like):
    """Writes the row's own key and value into their page."""
    keys = numbers(address_of(cached, cached.keys, item, item.own), (cached.D,), like)
    values = numbers(address_of(cached, cached.values, item, item.own), (cached.D,), like)
    for d in range(cached.D):
        keys[d] = narrow(k[d], like[0])
        values[d] = narrow(v[d], like[0])


@njit(inline="always")
def attend(model, op, x, work):
    """x = what the rows of q attend to; the keys and values of the tokens are cached."""
    items = np.zeros(op.cached.items, ITEM)
    _attend_parts(model, op, items, work)
    barrier()
    _join_parts(model, op.cached, items, x, work)


@njit
def _attend_parts(model, op, items, work):
    """This thread's part of the keys: of each key-value head in it the maximum, sum and weighted values of its query
    heads."""
    apart()
    cached, D, G, like = op.cached, model.D, model.heads // model.groups, work.like
    runs, q = np.empty((POSITIONS, 5), np.int64), np.empty((G, D), np.float32)
    weights, lengths = np.empty((G, POSITIONS), np.float32), carray(pointer(model.lengths), (work.B,), np.int32)
    qkv = float32s(model.qkv, (model.rows, (model.heads + 2 * model.groups) * D))
    results = float32s(model.partial, (cached.items + work.threads, G, D + 2))
    cosines, sines = numbers(model.cos, (model.L, D), like), numbers(model.sin, (model.L, D), like)
    total = list_heads(cached, lengths, items)
    first, end = total * work.thread // work.threads, total * (work.thread + 1) // work.threads
    for i in range(cached.items):
        item = items[i]
        if item.before >= end or item.before + item.end - item.first <= first:
            continue
        low, high = part_of(item, first, end)
        b, cos, sin = item.b, piece(cosines, item.own, 0, D), piece(sines, item.own, 0, D)
        if high == item.end:
            k_at = (model.heads + item.n) * D
            v_at, k = k_at + model.groups * D, piece(q, 0, 0, D)
            _head(piece(qkv, b, k_at, k_at + D), op.k_norm, op.head_eps, cos, sin, k, like)
            _write(cached, item, k, piece(qkv, b, v_at, v_at + D), like)
        for g in range(G):
            at = (item.n * G + g) * D
            _head(piece(qkv, b, at, at + D), op.q_norm, op.head_eps, cos, sin, piece(q, g, 0, D), like)
        attend_part(cached, item, low, high, runs, q, weights, results[i + work.thread], like)


@njit
def _join_parts(model, cached, items, x, work):
    """x = the heads' outputs, joined from the parts that threads have of the keys."""
    apart()
    D, G, threads = model.D, model.heads // model.groups, work.threads
    results = float32s(model.partial, (cached.items + threads, G, D + 2))
    last, total = 0, items[cached.items - 1].before + items[cached.items - 1].end - items[cached.items - 1].first
    for i in range(cached.items):
        item = items[i]
        end = item.before + item.end - item.first
        while total * (last + 1) // threads <= item.before:
            last += 1
        first = last
        while total * (last + 1) // threads < end:
            last += 1
        for g in range(G):
            at = (item.n * G + g) * D
            out = piece(x, item.b, at, at + D)
            join(results, i + first, i + last + 1, g, out)
            for d in range(D):
                out[d] = rounded(out[d], work.like[0])
