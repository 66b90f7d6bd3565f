"""CPU kernel of a whole decode step: one call for all layers, on all threads, with barriers between its phases.
`sandcat.decoding.fused_cpu` writes its program, linears.py has its linear layers.

Shapes: B sequences in R rows (see linears.py), H hidden size, I intermediate size, D size of a head, G query heads a
key-value head, L tokens of a sequence, at most. The residual state h is float32; what transformers rounds to the
model's dtype inside a layer is rounded here too.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit, types

from sandcat.ops.numba.paged_attention import ITEM, JOB, POSITIONS
from sandcat.ops.numba.primitives.activations import activate_all
from sandcat.ops.numba.primitives.amx import release_tiles
from sandcat.ops.numba.primitives.dtypes import CODES, STORAGE, narrow, rounded, widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.rows import norm
from sandcat.ops.numba.primitives.threads import VERSION, float32s, numbers, on_all_threads, piece, pointer
from sandcat.ops.numba.step.attention import attend, joined
from sandcat.ops.numba.step.linears import (
    LINEAR,
    Work,
    begin,
    finish,
    keep_above,
    keep_any,
    keep_one,
    listed_outputs,
    pack,
    record,
    share,
)
from sandcat.ops.weights import CODED

EMBED, NORM, PROJECT, ATTEND, NEURONS, END = range(6)
ADD, LOGITS, PRODUCT, ACCUMULATE, DROPPED = range(6, 11)
GATE, GIVE, TAKE, FILL = range(11, 15)
"""What a record of the program does; x is each thread's own, the rest all threads share:

- EMBED: h = the rows of the tokens. NORM: x = h after a norm. END: lengths go on by one.
- PROJECT: the rows of q, k and v = products with x. ATTEND: x = what they attend to.
- NEURONS: hidden = activation(gate(x)) * up(x).
- One product with a source. ADD: h += it. LOGITS: they are it. Where products are not merged, PRODUCT: some columns of
  a target = it, ACCUMULATE: += it. DROPPED: between = a product with what another one drops of its source.
- GATE: hidden = activation(gate) * up of two targets.
- Around a module that is called: GIVE: a tensor = x or hidden; TAKE: h += a tensor, FILL: columns of a target = one.
"""
OP = record("code operand")
"""A record: its code, and the address of its operand, which is one of those below."""
X, HIDDEN, BETWEEN = range(3)
"""What a record reads: its `source`."""
NORMED = record("weight", "eps")
PROJECTED = record("", **dict.fromkeys(("q", "k", "v"), LINEAR))
ATTENDED = record("q_norm k_norm", "head_eps", cached=JOB)
NEURONAL = record("activation skips masks shared neurons neuron_threshold", gate=LINEAR, up=LINEAR)
"""`skips`: neurons with |activation| <= neuron_threshold are skipped; `masks`: they are read, and count as 0; `shared`:
by one list for all sequences."""
PRODUCED = record("source target row at threshold", linear=LINEAR)
"""A target is float32 [R, row], of which the columns from `at` on are meant; `threshold`: of what is DROPPED."""
GATING = record("gate up row activation neurons")
MOVED = record("source tensor size target row at")
"""A tensor [B, size] in the model's dtype."""
MODEL = record(
    "sequences rows tokens lengths table table_row table_column vocabulary cos sin h qkv partial hidden between "
    "logits scores outputs heads groups D H L x y kept wanted values sums room most stride tiles rank",
)
"""`tokens` [B]: the ids; `table_row`, `table_column`: how far rows and columns of the embedding table lie apart;
`groups`: key-value heads; `lengths` [B]: tokens cached, int32; `outputs`: logits; between [R, rank]. Of each thread: x,
y and values [R, most], kept and wanted [most], sums [R, stride] (see linears.py), room [tiles], where `most` is the
most units that a matrix has."""

BLOCK = 64
"""Neurons whose gates are computed before the rows of those that are kept, for one sequence."""

_barrier = types.ExternalFunction("GOMP_barrier", types.void())


@njit
def _round(y, first, end, work):
    for b in range(work.B):
        row = piece(y, b, first, end)
        for r in range(row.size):
            row[r] = rounded(row[r], work.like[0])


@njit
def _activations(g, first, end, code, work):
    for b in range(work.B):
        activate_all(piece(g, b, first, end), code, work.like[0])


@njit
def _multiply(layer, x, a, threshold, count, work, hidden):
    """hidden = a * up(x) of the listed neurons, 0 where a sequence does not keep one."""
    like, values, own = work.like[0], work.values, not layer.shared
    listed_outputs(layer.up, x, count, values, work)
    for b in range(work.B):
        for c in range(count):
            j = work.kept[c]
            value = rounded(a[b, j] * rounded(values[b, c], like), like)
            if own and abs(a[b, j]) <= widen(threshold[j]):
                value = np.float32(0)
            hidden[b, j] = value


@njit
def _kept_neurons(layer, x, a, first, end, work, hidden):
    """hidden[:, first:end] = a * up(x), where |a| is above the threshold; else 0, and the row is not read."""
    threshold = numbers(layer.neuron_threshold, (layer.neurons,), work.like)
    hidden[:, first:end] = 0
    if work.B == 1:
        count = keep_one(a[0], threshold, first, end, work.kept, work.values[0])
    else:
        count = keep_any(a, threshold, first, end, work)
    _multiply(layer, x, a, threshold, count, work, hidden)


@njit
def _shared_neurons(layer, x, a, first, end, work, hidden):
    """The same, of the neurons that all sequences share."""
    threshold = numbers(layer.neuron_threshold, (layer.neurons,), work.like)
    hidden[:, first:end] = 0
    _barrier()
    count = list_shared(a[: work.B], threshold, work.kept)
    first, end = count * work.thread // work.threads, count * (work.thread + 1) // work.threads
    work.kept[: end - first] = work.kept[first:end].copy()
    _multiply(layer, x, a, threshold, end - first, work, hidden)


@njit
def _mask_shared(layer, a, first, end, work, hidden):
    """hidden[:, first:end] = 0 of the neurons that the sequences do not share."""
    threshold, wanted = numbers(layer.neuron_threshold, (layer.neurons,), work.like), work.wanted
    _barrier()
    count = list_shared(a[: work.B], threshold, work.kept)
    wanted[: layer.neurons] = False
    for c in range(count):
        wanted[work.kept[c]] = True
    for b in range(work.B):
        for j in range(first, end):
            if not wanted[j]:
                hidden[b, j] = 0


@njit
def _neurons(layer, x, a, first, end, work, hidden):
    """hidden[:, first:end] = activation(gate(x)) * up(x)."""
    gate, up, I, like = layer.gate, layer.up, layer.neurons, work.like[0]
    if not (gate.by_inputs and up.by_inputs):
        pack(gate, x, work)
    if layer.skips and work.B == 1 and not gate.by_inputs:
        for at in range(first, end, BLOCK):
            to = min(end, at + BLOCK)
            begin(gate, x, at, to, a, 0, work)
            _activations(a, at, to, layer.activation, work)
            _kept_neurons(layer, x, a, at, to, work, hidden)
        return
    begin(gate, x, first, end, a, 0, work)
    if not layer.skips:
        begin(up, x, first, end, hidden, I, work)
    if gate.summed or (up.summed and not layer.skips):
        _barrier()
    finish(gate, first, end, a, 0, work)
    _activations(a, first, end, layer.activation, work)
    if layer.skips and layer.shared:
        _shared_neurons(layer, x, a, first, end, work, hidden)
    elif layer.skips:
        _kept_neurons(layer, x, a, first, end, work, hidden)
    else:
        finish(up, first, end, hidden, I, work)
        for b in range(work.B):
            a_b, hidden_b = piece(a, b, first, end), piece(hidden, b, first, end)
            for j in range(hidden_b.size):
                hidden_b[j] = rounded(a_b[j] * rounded(hidden_b[j], like), like)
            if layer.masks and not layer.shared:
                threshold = numbers(layer.neuron_threshold, (layer.neurons,), work.like)[first:end]
                keep_above(hidden_b, a_b, threshold, hidden_b)
        if layer.masks and layer.shared:
            _mask_shared(layer, a, first, end, work, hidden)


@njit
def _norms(h, weight, eps, x, work):
    for b in range(len(h)):
        norm(h[b], numbers(weight, (h.shape[1],), work.like), eps, x[b])


@njit
def _project(layer, x, qkv, Q, K, work):
    q, k, v = layer.q, layer.k, layer.v
    q_at, q_to = share(Q, work)
    at, to = share(K, work)
    q_y, k_y, v_y = qkv[:, :Q], qkv[:, Q : Q + K], qkv[:, Q + K :]
    if not (q.by_inputs and k.by_inputs and v.by_inputs):
        pack(q, x, work)
    begin(q, x, q_at, q_to, q_y, 0, work)
    begin(k, x, at, to, k_y, Q, work)
    begin(v, x, at, to, v_y, Q + K, work)
    if q.summed or k.summed or v.summed:
        _barrier()
    finish(q, q_at, q_to, q_y, 0, work)
    finish(k, at, to, k_y, Q, work)
    finish(v, at, to, v_y, Q + K, work)
    _round(q_y, q_at, q_to, work)
    _round(k_y, at, to, work)
    _round(v_y, at, to, work)
    _barrier()


@njit
def _embed(model, h, work):
    H, rows, columns = model.H, model.table_row, model.table_column
    tokens = carray(pointer(model.tokens), (len(h),), np.int64)
    table = numbers(model.table, ((model.vocabulary - 1) * rows + (H - 1) * columns + 1,), work.like)
    first, end = share(H, work)
    for b in range(len(h)):
        for k in range(first, end):
            h[b, k] = widen(table[tokens[b] * rows + k * columns])
    _barrier()


@njit
def _dropped(x, threshold, inputs, work):
    """What is not above its threshold of x, else 0."""
    limit, dropped = numbers(threshold, (inputs,), work.like), work.values
    for b in range(work.B):
        x_b, dropped_b = piece(x, b, 0, inputs), piece(dropped, b, 0, inputs)
        for k in range(inputs):
            dropped_b[k] = x_b[k] if abs(x_b[k]) <= widen(limit[k]) else np.float32(0)
    return dropped


@njit
def _product(code, op, sources, y, scores, h, logits, work):
    """One product, of this thread's share of the outputs, and where it goes. It is called at one place, as the code of
    all formats is in it."""
    x, hidden, between = sources
    site, (first, end), like = op.linear, share(op.linear.outputs, work), work.like[0]
    x = hidden if op.source == HIDDEN else between if op.source == BETWEEN else x
    if code == DROPPED:
        x = _dropped(x, op.threshold, site.inputs, work)
    y = (scores if code == LOGITS else y)[:, : site.outputs]
    if not site.by_inputs:
        pack(site, x, work)
    begin(site, x, first, end, y, 0, work)
    if site.summed:
        _barrier()
    finish(site, first, end, y, 0, work)
    if code == ADD:
        _plus(h, 0, y, first, end, work)
    elif code == LOGITS:
        for b in range(work.B):
            for r in range(first, end):
                logits[b, r] = narrow(y[b, r], like)
    else:
        _round(y, first, end, work)
        target, at = (between, 0) if code == DROPPED else (float32s(op.target, (len(y), op.row)), op.at)
        if code != ACCUMULATE:
            for b in range(work.B):
                piece(target, b, at + first, at + end)[:] = 0
        _plus(target, at, y, first, end, work)
        _round(target, at + first, at + end, work)
    _barrier()


@njit
def _plus(target, at, y, first, end, work):
    for b in range(work.B):
        target_b, y_b = piece(target, b, at + first, at + end), piece(y, b, first, end)
        for k in range(y_b.size):
            target_b[k] += y_b[k]


@njit
def _gate(op, hidden, work):
    """hidden = activation(gate) * up."""
    gate, up = float32s(op.gate, (len(hidden), op.row)), float32s(op.up, (len(hidden), op.row))
    first, end = share(op.neurons, work)
    _activations(gate, first, end, op.activation, work)
    for b in range(work.B):
        a_b, up_b, hidden_b = piece(gate, b, first, end), piece(up, b, first, end), piece(hidden, b, first, end)
        for j in range(a_b.size):
            hidden_b[j] = rounded(a_b[j] * up_b[j], work.like[0])
    _barrier()


@njit
def _give(op, x, work):
    tensor = numbers(op.tensor, (work.B, op.size), work.like)
    first, end = share(op.size, work)
    for b in range(work.B):
        for k in range(first, end):
            tensor[b, k] = narrow(x[b, k], work.like[0])


@njit
def _take(op, h, work):
    """h += a tensor."""
    tensor = numbers(op.tensor, (work.B, op.size), work.like)
    first, end = share(op.size, work)
    for b in range(work.B):
        for k in range(first, end):
            h[b, k] += widen(tensor[b, k])
    _barrier()


@njit
def _fill(op, R, work):
    """Some columns of a target = a tensor."""
    tensor, target = numbers(op.tensor, (work.B, op.size), work.like), float32s(op.target, (R, op.row))
    first, end = share(op.size, work)
    for b in range(work.B):
        for k in range(first, end):
            target[b, op.at + k] = widen(tensor[b, k])
    _barrier()


@njit
def _attend(model, op, x, room, work):
    """x = what the rows of q, k and v attend to."""
    attend(model, op, work.thread, work.threads, room, work.like)
    _barrier()
    joined(model, op.cached, work.threads, room[0], x, work.like[0])


@njit
def _operand(op, kind):
    return carray(pointer(op.operand), (1,), kind)[0]


@njit
def _run(model, program, work):
    B, R, D, H, V = work.B, model.rows, model.D, model.H, model.outputs
    Q, K, most = model.heads * D, model.groups * D, model.most
    lengths = carray(pointer(model.lengths), (B,), np.int32)
    h, qkv, hidden = float32s(model.h, (B, H)), float32s(model.qkv, (R, Q + 2 * K)), float32s(model.hidden, (R, most))
    own = float32s(model.x, (work.threads, R, most))[work.thread]
    between = float32s(model.between, (R, model.rank))
    gates = float32s(model.y, (work.threads, R, most))
    y = gates[work.thread]
    scores, logits = float32s(model.scores, (R, V)), numbers(model.logits, (B, V), work.like)
    G, items = model.heads // model.groups, np.zeros(B * model.groups, ITEM)
    weights, q = np.empty((G, POSITIONS), np.float32), np.empty((G, D), np.float32)
    room = (items, np.empty((POSITIONS, 5), np.int64), q, weights)
    for i in range(len(program)):
        op = program[i]
        code = op.code
        if code == EMBED:
            _embed(model, h, work)
        elif code == NORM:
            normed = _operand(op, NORMED)
            _norms(h, normed.weight, normed.eps, own, work)
        elif code == PROJECT:
            _project(_operand(op, PROJECTED), own, qkv, Q, K, work)
        elif code == ATTEND:
            _attend(model, _operand(op, ATTENDED), own, room, work)
        elif code == NEURONS:
            layer = _operand(op, NEURONAL)
            first, end = share(layer.neurons, work)
            a = gates[0, :, : layer.neurons] if layer.shared else y[:, : layer.neurons]
            _neurons(layer, own, a, first, end, work, hidden[:, : layer.neurons])
            _barrier()
        elif code == END:
            if work.thread == 0:
                for b in range(B):
                    lengths[b] += 1
        elif code == GATE:
            _gate(_operand(op, GATING), hidden, work)
        elif code == GIVE:
            moved = _operand(op, MOVED)
            _give(moved, hidden if moved.source == HIDDEN else own, work)
        elif code == TAKE:
            _take(_operand(op, MOVED), h, work)
        elif code == FILL:
            _fill(_operand(op, MOVED), R, work)
        else:
            _product(code, _operand(op, PRODUCED), (own, hidden, between), y, scores, h, logits, work)


@cache
def kernel(dtype: torch.dtype, tiles: bool, formats: frozenset[str]):
    """Runs a program for one dtype, with the processor's matrix unit or without, and for weights of these formats,
    compiled on first use (and then cached on disk).

    Called with the addresses of a `MODEL` and of the first `OP`, how many there are, the `VERSION`, and how many
    threads it may run on.
    """
    storage, version = STORAGE[dtype], VERSION
    codes = tuple(np.zeros(1, CODES[name]) if name in formats else None for name in CODED)

    def body(args, thread, threads):
        if args[3] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        model = carray(pointer(args[0]), (1,), MODEL)[0]
        program = carray(pointer(args[1]), (args[2],), OP)
        R, most = model.rows, model.most
        like = np.zeros(1, storage)
        kept = carray(pointer(model.kept), (threads, most), np.int64)[thread]
        wanted = carray(pointer(model.wanted), (threads, most), np.bool_)[thread]
        values = float32s(model.values, (threads, R, most))[thread]
        sums = float32s(model.sums, (threads, R, model.stride))
        room = carray(pointer(model.room), (threads, model.tiles), np.int32)[thread] if tiles else None
        work = Work(model.sequences, thread, threads, like, codes, kept, wanted, values, sums, room)
        _run(model, program, work)
        if tiles:
            release_tiles()

    return on_all_threads(body)
