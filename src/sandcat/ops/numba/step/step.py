"""CPU kernel of a whole decode step: one call for all layers, on all threads, with barriers between its phases.
`sandcat.decoding.fused_cpu` fills its tables, linears.py has its linear layers.

Shapes: B sequences in R rows (see linears.py), H hidden size, I intermediate size, D size of a head, G query heads a
key-value head, L positions of the cache. The residual state h is float32; what transformers rounds to the model's dtype
inside a layer is rounded here too.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit, types

from sandcat.ops.numba.primitives.activations import activate_all
from sandcat.ops.numba.primitives.amx import release_tiles
from sandcat.ops.numba.primitives.dtypes import CODES, STORAGE, narrow, rounded, widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.rows import norm
from sandcat.ops.numba.primitives.threads import VERSION, float32s, numbers, on_all_threads, piece, pointer
from sandcat.ops.numba.step.attention import POSITIONS, attend, joined
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

LAYER = record(
    "input_norm q_norm k_norm mlp_norm keys values window activation skips masks shared neurons neuron_threshold",
    "input_eps head_eps mlp_eps scaling",
    **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), LINEAR),
)
"""`skips`: neurons with |activation| <= neuron_threshold are skipped; `masks`: they are read, and count as 0; `shared`:
by one list for all sequences."""
MODEL = record(
    "sequences rows tokens position table table_row table_column vocabulary cos sin h qkv partial hidden scores logits "
    "norm layers heads groups parts D H L x y kept wanted values sums room most stride tiles",
    "eps",
    head=LINEAR,
)
"""`tokens` [B]: the ids; `table_row`, `table_column`: how far rows and columns of the embedding table lie apart;
`groups`: key-value heads; `parts`: see `parts_of`. Of each thread: x, y and values [R, most], kept and wanted [most],
sums [R, stride] (see linears.py), room [tiles], where `most` is the most units that a matrix has."""

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
def _add(site, x, h, y, work):
    """h += a linear layer's outputs."""
    y, (first, end) = y[:, : site.outputs], share(site.outputs, work)
    if not site.by_inputs:
        pack(site, x, work)
    begin(site, x, first, end, y, 0, work)
    if site.summed:
        _barrier()
    finish(site, first, end, y, 0, work)
    for b in range(work.B):
        h_b, y_b = piece(h, b, first, end), piece(y, b, first, end)
        for k in range(h_b.size):
            h_b[k] += y_b[k]
    _barrier()


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
def _step(model, layers, work):
    B, R, D, H, V = work.B, model.rows, model.D, model.H, model.head.outputs
    Q, K, most, like = model.heads * D, model.groups * D, model.most, work.like
    position = carray(pointer(model.position), (1,), np.int32)
    h, qkv, hidden = float32s(model.h, (B, H)), float32s(model.qkv, (R, Q + 2 * K)), float32s(model.hidden, (R, most))
    x = float32s(model.x, (work.threads, R, most))[work.thread]
    gates = float32s(model.y, (work.threads, R, most))
    y = gates[work.thread]
    weights, heads = np.empty(POSITIONS, np.float32), np.empty((model.heads // model.groups, D), np.float32)
    _embed(model, h, work)
    for i in range(model.layers):
        layer = layers[i]
        _norms(h, layer.input_norm, layer.input_eps, x, work)
        _project(layer, x, qkv, Q, K, work)
        items = B * model.groups * model.parts
        for item in range(items * work.thread // work.threads, items * (work.thread + 1) // work.threads):
            attend(model, layer, position[0], item, heads, weights, like)
        _barrier()
        joined(model, x, like[0])
        _add(layer.o, x, h, y, work)
        _norms(h, layer.mlp_norm, layer.mlp_eps, x, work)
        first, end = share(layer.neurons, work)
        a = gates[0, :, : layer.neurons] if layer.shared else y[:, : layer.neurons]
        _neurons(layer, x, a, first, end, work, hidden[:, : layer.neurons])
        _barrier()
        _add(layer.down, hidden, h, y, work)
    _norms(h, model.norm, model.eps, x, work)
    scores, logits = float32s(model.scores, (R, V))[:, :V], numbers(model.logits, (B, V), like)
    first, end = share(V, work)
    if not model.head.by_inputs:
        pack(model.head, x, work)
    begin(model.head, x, first, end, scores, 0, work)
    if model.head.summed:
        _barrier()
    finish(model.head, first, end, scores, 0, work)
    for b in range(B):
        for r in range(first, end):
            logits[b, r] = narrow(scores[b, r], like[0])
    if work.thread == 0:
        position[0] += 1


@cache
def kernel(dtype: torch.dtype, tiles: bool, formats: frozenset[str]):
    """The step for one dtype, with the processor's matrix unit or without, and for weights of these formats, compiled
    on first use (and then cached on disk).

    Called with the addresses of a `MODEL` and of its `LAYER`s, the `VERSION`, and how many threads it may run on.
    """
    storage, version = STORAGE[dtype], VERSION
    codes = tuple(np.zeros(1, CODES[name]) if name in formats else None for name in CODED)

    def body(args, thread, threads):
        if args[2] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        model = carray(pointer(args[0]), (1,), MODEL)[0]
        layers = carray(pointer(args[1]), (model.layers,), LAYER)
        R, most = model.rows, model.most
        like = np.zeros(1, storage)
        kept = carray(pointer(model.kept), (threads, most), np.int64)[thread]
        wanted = carray(pointer(model.wanted), (threads, most), np.bool_)[thread]
        values = float32s(model.values, (threads, R, most))[thread]
        sums = float32s(model.sums, (threads, R, model.stride))
        room = carray(pointer(model.room), (threads, model.tiles), np.int32)[thread] if tiles else None
        _step(model, layers, Work(model.sequences, thread, threads, like, codes, kept, wanted, values, sums, room))
        if tiles:
            release_tiles()

    return on_all_threads(body)
