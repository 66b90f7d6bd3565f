"""What the records of a decode step do on a CPU (records.py): each a function at an address, which is compiled when a
program has such a record.

Shapes: as in records.py. The residual state h is float32; what transformers rounds to the model's dtype inside a layer
is rounded here too.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit

from sandcat.ops.numba.primitives.activations import activate_all
from sandcat.ops.numba.primitives.dtypes import STORAGE, narrow, rounded, widen
from sandcat.ops.numba.primitives.memory import columns, float32s, numbers, piece, pointer, record_at
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.numba.primitives.rows import norm
from sandcat.ops.numba.primitives.threads import VERSION, at_address
from sandcat.ops.numba.step.attention import attend
from sandcat.ops.numba.step.barrier import barrier
from sandcat.ops.numba.step.linears import begin, finish, pack, share, work_of
from sandcat.ops.numba.step.neurons import neurons
from sandcat.ops.numba.step.records import (
    ACCUMULATE,
    ADD,
    ATTENDED,
    BETWEEN,
    DROPPED,
    GATING,
    HIDDEN,
    LOGITS,
    MODEL,
    MOVED,
    NEURONAL,
    NORMED,
    PRODUCED,
    PROJECTED,
)

EMBED, NORM, PROJECT, ATTEND, NEURONS, PRODUCE, GATE, GIVE, TAKE, FILL, END = range(11)
"""What a record does:

- EMBED: h = the rows of the tokens. NORM: x = h after a norm. END: lengths go on by one.
- PROJECT: the rows of q, k and v = products with x. ATTEND: x = what they attend to.
- NEURONS: hidden = activation(gate(x)) * up(x). GATE: the same of two targets.
- PRODUCE: one product with a source.
- Around a module that is called: GIVE: a tensor = x or hidden; TAKE: h += a tensor, FILL: columns of a target = one.
"""


@njit
def _state(model):
    return float32s(model.h, (model.sequences, model.H))


@njit
def _hidden(model):
    return float32s(model.hidden, (model.rows, model.most))


@njit
def _of_thread(model, address, work):
    """A thread's own [R, most]."""
    return float32s(address, (work.threads, model.rows, model.most))[work.thread]


@njit(inline="always")
def _embed(model, work):
    H, rows, apart_by, h = model.H, model.table_row, model.table_column, _state(model)
    tokens = carray(pointer(model.tokens), (work.B,), np.int64)
    table = numbers(model.table, ((model.vocabulary - 1) * rows + (H - 1) * apart_by + 1,), work.like)
    first, end = share(H, work)
    for b in range(work.B):
        for k in range(first, end):
            h[b, k] = widen(table[tokens[b] * rows + k * apart_by])
    barrier()


@njit(inline="always")
def _norm(model, op, work):
    h, x, weight = _state(model), _of_thread(model, model.x, work), numbers(op.weight, (model.H,), work.like)
    for b in range(work.B):
        norm(piece(h, b, 0, model.H), weight, op.eps, piece(x, b, 0, model.H))


@njit(inline="always")
def _project(model, op, work):
    Q, K, (q, k, v) = model.heads * model.D, model.groups * model.D, (op.q, op.k, op.v)
    x, qkv = columns(_of_thread(model, model.x, work), 0, model.H), float32s(model.qkv, (model.rows, Q + 2 * K))
    (q_at, q_to), (at, to) = share(Q, work), share(K, work)
    q_y, k_y, v_y = columns(qkv, 0, Q), columns(qkv, Q, Q + K), columns(qkv, Q + K, Q + 2 * K)
    if not (q.by_inputs and k.by_inputs and v.by_inputs):
        pack(q, x, work)
    begin(q, x, q_at, q_to, q_y, work)
    begin(k, x, at, to, k_y, work)
    begin(v, x, at, to, v_y, work)
    if q.summed or k.summed or v.summed:
        barrier()
    finish(q, q_at, q_to, q_y, work)
    finish(k, at, to, k_y, work)
    finish(v, at, to, v_y, work)
    _round(q_y, q_at, q_to, work)
    _round(k_y, at, to, work)
    _round(v_y, at, to, work)
    barrier()


@njit
def _round(y, first, end, work):
    apart()
    for b in range(work.B):
        row = piece(y, b, first, end)
        for r in range(row.size):
            row[r] = rounded(row[r], work.like[0])


@njit(inline="always")
def _neurons(model, op, work):
    """Sequences that share a list look at the gates of all threads."""
    gates = float32s(model.y, (work.threads, model.rows, model.most))
    first, end = share(op.neurons, work)
    a, hidden = columns(gates[0 if op.shared else work.thread], 0, op.neurons), columns(_hidden(model), 0, op.neurons)
    neurons(op, columns(_of_thread(model, model.x, work), 0, model.H), a, first, end, work, hidden)
    barrier()


@njit
def _dropped(x, threshold, inputs, work):
    """What is not above its threshold of x, else 0."""
    limit, dropped = numbers(threshold, (inputs,), work.like), columns(work.values, 0, inputs)
    for b in range(work.B):
        x_b, dropped_b = piece(x, b, 0, inputs), piece(dropped, b, 0, inputs)
        for k in range(inputs):
            dropped_b[k] = x_b[k] if abs(x_b[k]) <= widen(limit[k]) else np.float32(0)
    return dropped


@njit(inline="always")
def _source(model, op, work):
    if op.source == HIDDEN:
        return columns(_hidden(model), 0, op.linear.inputs)
    if op.source == BETWEEN:
        return columns(float32s(model.between, (model.rows, model.rank)), 0, op.linear.inputs)
    return columns(_of_thread(model, model.x, work), 0, op.linear.inputs)


@njit(inline="always")
def _produce(model, op, work):
    """One product, of this thread's share of the outputs, and where it goes."""
    site, (first, end), R = op.linear, share(op.linear.outputs, work), model.rows
    x = _source(model, op, work)
    if op.into == DROPPED:
        x = _dropped(x, op.threshold, site.inputs, work)
    if op.into == LOGITS:
        y = columns(float32s(model.scores, (R, model.outputs)), 0, site.outputs)
    else:
        y = columns(_of_thread(model, model.y, work), 0, site.outputs)
    if not site.by_inputs:
        pack(site, x, work)
    begin(site, x, first, end, y, work)
    if site.summed:
        barrier()
    finish(site, first, end, y, work)
    _put(model, op, y, first, end, work)
    barrier()


@njit
def _put(model, op, y, first, end, work):
    apart()
    R, like = model.rows, work.like[0]
    if op.into == ADD:
        _plus(columns(_state(model), 0, model.H), op.at, y, first, end, work)
    elif op.into == LOGITS:
        logits = numbers(model.logits, (work.B, model.outputs), work.like)
        for b in range(work.B):
            row, to = piece(y, b, first, end), piece(logits, b, first, end)
            for r in range(row.size):
                to[r] = narrow(row[r], like)
    else:
        _round(y, first, end, work)
        between = columns(float32s(model.between, (R, model.rank)), 0, model.rank)
        at = 0 if op.into == DROPPED else op.at
        target = between if op.into == DROPPED else columns(float32s(op.target, (R, op.row)), 0, op.row)
        if op.into != ACCUMULATE:
            for b in range(work.B):
                to = piece(target, b, at + first, at + end)
                for r in range(to.size):
                    to[r] = 0
        _plus(target, at, y, first, end, work)
        _round(target, at + first, at + end, work)


@njit
def _plus(target, at, y, first, end, work):
    for b in range(work.B):
        target_b, y_b = piece(target, b, at + first, at + end), piece(y, b, first, end)
        for k in range(y_b.size):
            target_b[k] += y_b[k]


@njit(inline="always")
def _gate(model, op, work):
    R, (first, end) = model.rows, share(op.neurons, work)
    gate, up, hidden = float32s(op.gate, (R, op.row)), float32s(op.up, (R, op.row)), _hidden(model)
    for b in range(work.B):
        a_b, up_b, hidden_b = piece(gate, b, first, end), piece(up, b, first, end), piece(hidden, b, first, end)
        activate_all(a_b, op.activation, work.like[0])
        for j in range(a_b.size):
            hidden_b[j] = rounded(a_b[j] * up_b[j], work.like[0])
    barrier()


@njit(inline="always")
def _give(model, op, work):
    x = _hidden(model) if op.source == HIDDEN else _of_thread(model, model.x, work)
    tensor, (first, end) = numbers(op.tensor, (work.B, op.size), work.like), share(op.size, work)
    for b in range(work.B):
        for k in range(first, end):
            tensor[b, k] = narrow(x[b, k], work.like[0])


@njit(inline="always")
def _take(model, op, work):
    h, tensor, (first, end) = _state(model), numbers(op.tensor, (work.B, op.size), work.like), share(op.size, work)
    for b in range(work.B):
        for k in range(first, end):
            h[b, k] += widen(tensor[b, k])
    barrier()


@njit(inline="always")
def _fill(model, op, work):
    tensor, (first, end) = numbers(op.tensor, (work.B, op.size), work.like), share(op.size, work)
    target = float32s(op.target, (model.rows, op.row))
    for b in range(work.B):
        for k in range(first, end):
            target[b, op.at + k] = widen(tensor[b, k])
    barrier()


@njit(inline="always")
def _end(model, work):
    lengths = carray(pointer(model.lengths), (work.B,), np.int32)
    if work.thread == 0:
        for b in range(work.B):
            lengths[b] += 1


@cache
def operation(kind: int, dtype: torch.dtype) -> int:
    """The address of what records of a kind do in a model of one dtype, compiled on first use (and then cached on
    disk): a function of the addresses of a `MODEL` and of an operand, the thread's number, and how many there are."""
    storage, version = STORAGE[dtype], VERSION

    def body(model, operand, thread, threads):
        if thread == version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        given = record_at(model, MODEL)
        like = carray(pointer(model), (1,), storage)  # of which nobody reads the number
        work = work_of(given, thread, threads, like)
        if kind == EMBED:
            _embed(given, work)
        elif kind == NORM:
            _norm(given, record_at(operand, NORMED), work)
        elif kind == PROJECT:
            _project(given, record_at(operand, PROJECTED), work)
        elif kind == ATTEND:
            attend(given, record_at(operand, ATTENDED), _of_thread(given, given.x, work), work)
        elif kind == NEURONS:
            _neurons(given, record_at(operand, NEURONAL), work)
        elif kind == PRODUCE:
            _produce(given, record_at(operand, PRODUCED), work)
        elif kind == GATE:
            _gate(given, record_at(operand, GATING), work)
        elif kind == GIVE:
            _give(given, record_at(operand, MOVED), work)
        elif kind == TAKE:
            _take(given, record_at(operand, MOVED), work)
        elif kind == FILL:
            _fill(given, record_at(operand, MOVED), work)
        else:
            _end(given, work)

    return at_address(body)
