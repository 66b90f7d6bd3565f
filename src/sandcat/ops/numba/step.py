"""CPU kernel of a whole decode step of one sequence: one call for all layers, on all threads, with barriers between its
phases. `sandcat.cpu_step` fills its tables.

Shapes: H hidden size, I intermediate size, D size of a head, G query heads a key-value head, L positions of the cache.
The residual state h is float32; what transformers rounds to the model's dtype inside a layer is rounded here too. Each
thread computes its share of a matrix's outputs; where inputs are skipped, it adds up its share of those that are kept,
for rows are short and should be read whole, and the threads' sums are joined in their order.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit, types

from sandcat.ops.numba.attention import POSITIONS, attend, joined
from sandcat.ops.numba.floats import STORAGE, narrow, rounded, widen
from sandcat.ops.numba.sparse_mlp import activate
from sandcat.ops.numba.threads import VERSION, float32s, numbers, on_all_threads, pointer
from sandcat.ops.numba.vectors import add_rows, dot_rows, norm


def _record(integers: str, reals: str = "", **nested: np.dtype) -> np.dtype:
    fields = [(name, np.int64) for name in integers.split()] + [(name, np.float64) for name in reals.split()]
    return np.dtype(fields + list(nested.items()))


LINEAR = _record("weight scale bias threshold outputs inputs")
"""A matrix by its addresses and sizes, 0 for what it lacks. It is stored [outputs, inputs], and with a threshold for
each input, below which that is skipped, [inputs, outputs]; with scales as int8, else in the model's dtype."""
LAYER = _record(
    "input_norm q_norm k_norm mlp_norm keys values window activation skips neurons neuron_threshold",
    "input_eps head_eps mlp_eps scaling",
    **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), LINEAR),
)
"""`skips`: the down projection is stored [I, H], and neurons with |activation| <= neuron_threshold are skipped."""
MODEL = _record(
    "token position table table_row table_column vocabulary cos sin h qkv partial sums hidden scores logits norm "
    "layers heads groups parts D H L most room",
    "eps",
    head=LINEAR,
)
"""`table_row`, `table_column`: how far rows and columns of the embedding table lie apart; `groups`: key-value heads;
`parts`: see `parts_of`; `most`: the most inputs that a matrix has; `sums` [threads, room]: see `_begin`."""

UNIT = 16
"""Outputs that no two threads share: a cache line of float32."""
BLOCK = 64
"""Neurons whose gates are computed before the rows of those that are kept."""

_barrier = types.ExternalFunction("GOMP_barrier", types.void())


@njit
def _share(size, thread, threads):
    """Which outputs are this thread's."""
    units = -(-size // UNIT)
    return min(size, units * thread // threads * UNIT), min(size, units * (thread + 1) // threads * UNIT)


@njit
def _above(x, threshold, kept, values):
    """How many inputs are kept, after listing them; a NaN is kept."""
    count = 0
    for k in range(x.size):
        kept[count] = k
        values[count] = x[k]
        count += not abs(x[k]) <= widen(threshold[k])
    return count


@njit
def _codes(site):
    """What int8 weights are like."""
    return carray(pointer(site.weight), (1,), np.int8)


@njit
def _finish(site, first, end, y, like):
    """The scales of int8 weights, and the bias."""
    scale = numbers(site.scale, (site.outputs if site.scale else 0,), like)
    bias = numbers(site.bias, (site.outputs if site.bias else 0,), like)
    for r in range(first, end):
        if scale.size:
            y[r] *= widen(scale[r])
        if bias.size:
            y[r] += widen(bias[r])


@njit
def _all_inputs(site, x, first, end, y, like):
    rows = numbers(site.weight, (site.outputs, site.inputs), like)[first:end]
    dot_rows(x.reshape(1, -1), rows, None, y[first:end].reshape(1, -1))


@njit
def _listed_inputs(site, kept, values, y, like):
    rows = numbers(site.weight, (site.inputs, site.outputs), like)
    add_rows(y.reshape(1, -1), values.reshape(1, -1), rows, kept)


@njit
def _begin_listed(site, kept, values, sums, thread, threads, like):
    """sums = what this thread's share of the listed inputs adds to a linear layer's outputs."""
    sums = sums[: site.outputs]
    sums[:] = 0
    mine = slice(kept.size * thread // threads, kept.size * (thread + 1) // threads)
    if site.scale:
        _listed_inputs(site, kept[mine], values[mine], sums, _codes(site))
    else:
        _listed_inputs(site, kept[mine], values[mine], sums, like)


@njit
def _begin(site, x, kept, values, sums, thread, threads, first, end, y, like):
    """y[first:end] = those outputs of a linear layer; where inputs are skipped, `sums` as in `_begin_listed`, and when
    all threads have theirs `_end` gives y."""
    x = x[: site.inputs]
    if site.threshold:
        count = _above(x, numbers(site.threshold, (site.inputs,), like), kept, values)
        _begin_listed(site, kept[:count], values[:count], sums, thread, threads, like)
        return
    if site.scale:
        _all_inputs(site, x, first, end, y, _codes(site))
    else:
        _all_inputs(site, x, first, end, y, like)
    _finish(site, first, end, y, like)


@njit
def _end(site, sums, first, end, y, like):
    """y[first:end] = those outputs of a layer whose inputs are listed, from the `sums` [threads, outputs] of all."""
    y[first:end] = sums[0, first:end]
    for thread in range(1, len(sums)):
        for r in range(first, end):
            y[r] += sums[thread, r]
    _finish(site, first, end, y, like)


@njit
def _round(y, like):
    for r in range(y.size):
        y[r] = rounded(y[r], like)


@njit
def _activations(g, code, like):
    for j in range(g.size):
        g[j] = rounded(activate(rounded(g[j], like), code), like)


@njit
def _listed_outputs(site, x, kept, values, like):
    """values[c] = row kept[c] of W times x."""
    rows = numbers(site.weight, (site.outputs, site.inputs), like)
    dot_rows(x.reshape(1, -1), rows, kept, values.reshape(1, -1))


@njit
def _kept_neurons(layer, x, a, threshold, kept, values, first, end, hidden, like):
    """hidden[first:end] = a * up(x), where |a| is above the threshold; else 0, and the row is not read."""
    up, count = layer.up, 0
    for j in range(first, end):
        hidden[j] = 0
        kept[count] = j
        count += not abs(a[j]) <= widen(threshold[j])
    if up.scale:
        _listed_outputs(up, x, kept, values[:count], _codes(up))
    else:
        _listed_outputs(up, x, kept, values[:count], like)
    scale = numbers(up.scale, (up.outputs if up.scale else 0,), like)
    bias = numbers(up.bias, (up.outputs if up.bias else 0,), like)
    for c in range(count):
        j = kept[c]
        u = values[c] * widen(scale[j]) if scale.size else values[c]
        u = u + widen(bias[j]) if bias.size else u
        hidden[j] = rounded(a[j] * rounded(u, like[0]), like[0])


@njit
def _neurons(layer, x, a, kept, values, sums, thread, threads, first, end, hidden, like):
    """hidden[first:end] = activation(gate(x)) * up(x)."""
    gate, up, mine, I = layer.gate, layer.up, sums[thread], layer.neurons
    whole = not layer.skips or gate.threshold != 0
    if whole:
        _begin(gate, x, kept, values, mine, thread, threads, first, end, a, like)
        if not layer.skips:
            _begin(up, x, kept, values, mine[I:], thread, threads, first, end, hidden, like)
        if gate.threshold or (up.threshold and not layer.skips):
            _barrier()
        if gate.threshold:
            _end(gate, sums, first, end, a, like)
        _activations(a[first:end], layer.activation, like[0])
    if not layer.skips:
        if up.threshold:
            _end(up, sums[:, I:], first, end, hidden, like)
        for j in range(first, end):
            hidden[j] = rounded(a[j] * rounded(hidden[j], like[0]), like[0])
        return
    threshold = numbers(layer.neuron_threshold, (I,), like)
    for at in range(first, end, BLOCK):
        to = min(end, at + BLOCK)
        if not whole:
            _begin(gate, x, kept, values, mine, thread, threads, at, to, a, like)
            _activations(a[at:to], layer.activation, like[0])
        _kept_neurons(layer, x[: up.inputs], a, threshold, kept, values, at, to, hidden, like)


@njit
def _down(layer, hidden, kept, values, sums, thread, threads, first, end, y, like):
    """y[first:end] = the down projection; of skipped neurons, whose hidden is 0, nothing is read."""
    if layer.skips:
        count = 0
        for j in range(layer.neurons):
            kept[count] = j
            values[count] = hidden[j]
            count += hidden[j] != 0
        _begin_listed(layer.down, kept[:count], values[:count], sums[thread], thread, threads, like)
    else:
        _begin(layer.down, hidden, kept, values, sums[thread], thread, threads, first, end, y, like)
    if layer.skips or layer.down.threshold:
        _barrier()
        _end(layer.down, sums, first, end, y, like)


@njit
def _step(model, layers, thread, threads, like):
    position, token = carray(pointer(model.position), (1,), np.int32), model.token
    D, H, parts = model.D, model.H, model.parts
    Q, K = model.heads * D, model.groups * D
    h, qkv = float32s(model.h, (H,)), float32s(model.qkv, (Q + 2 * K,))
    hidden, logits = float32s(model.hidden, (model.most,)), numbers(model.logits, (model.head.outputs,), like)
    x, y, values = np.empty(model.most, np.float32), np.empty(model.most, np.float32), np.empty(model.most, np.float32)
    kept, weights = np.empty(model.most, np.int64), np.empty(POSITIONS, np.float32)
    heads = np.empty((model.heads // model.groups, D), np.float32)
    first, end = _share(H, thread, threads)
    sums = float32s(model.sums, (threads, model.room))
    mine = sums[thread]
    table = numbers(model.table, ((model.vocabulary - 1) * model.table_row + (H - 1) * model.table_column + 1,), like)
    for k in range(first, end):
        h[k] = widen(table[token * model.table_row + k * model.table_column])
    _barrier()
    for i in range(model.layers):
        layer = layers[i]
        norm(h, numbers(layer.input_norm, (H,), like), layer.input_eps, x)
        q_at, q_to = _share(Q, thread, threads)
        at, to = _share(K, thread, threads)
        q, k, v, q_y, k_y, v_y = layer.q, layer.k, layer.v, qkv[:Q], qkv[Q : Q + K], qkv[Q + K :]
        _begin(q, x, kept, values, mine, thread, threads, q_at, q_to, q_y, like)
        _begin(k, x, kept, values, mine[Q:], thread, threads, at, to, k_y, like)
        _begin(v, x, kept, values, mine[Q + K :], thread, threads, at, to, v_y, like)
        if q.threshold or k.threshold or v.threshold:
            _barrier()
        if q.threshold:
            _end(q, sums, q_at, q_to, q_y, like)
        if k.threshold:
            _end(k, sums[:, Q:], at, to, k_y, like)
        if v.threshold:
            _end(v, sums[:, Q + K :], at, to, v_y, like)
        _round(q_y[q_at:q_to], like[0])
        _round(k_y[at:to], like[0])
        _round(v_y[at:to], like[0])
        _barrier()
        items = model.groups * parts
        for item in range(items * thread // threads, items * (thread + 1) // threads):
            attend(model, layer, position[0], parts, item, heads, weights, like)
        _barrier()
        joined(model, parts, x, like[0])
        _begin(layer.o, x, kept, values, mine, thread, threads, first, end, y, like)
        if layer.o.threshold:
            _barrier()
            _end(layer.o, sums, first, end, y, like)
        for k in range(first, end):
            h[k] += y[k]
        _barrier()
        norm(h, numbers(layer.mlp_norm, (H,), like), layer.mlp_eps, x)
        at, to = _share(layer.neurons, thread, threads)
        _neurons(layer, x, y, kept, values, sums, thread, threads, at, to, hidden, like)
        _barrier()
        _down(layer, hidden, kept, values, sums, thread, threads, first, end, y, like)
        for k in range(first, end):
            h[k] += y[k]
        _barrier()
    norm(h, numbers(model.norm, (H,), like), model.eps, x)
    scores = float32s(model.scores, (model.head.outputs,))
    at, to = _share(model.head.outputs, thread, threads)
    _begin(model.head, x, kept, values, mine, thread, threads, at, to, scores, like)
    if model.head.threshold:
        _barrier()
        _end(model.head, sums, at, to, scores, like)
    for r in range(at, to):
        logits[r] = narrow(scores[r], like[0])
    if thread == 0:
        position[0] += 1


@cache
def kernel(dtype: torch.dtype):
    """The step for one dtype, compiled on first use (and then cached on disk).

    Called with the addresses of a `MODEL` and of its `LAYER`s, the `VERSION`, and how many threads it may run on.
    """
    storage, version = STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[2] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        model = carray(pointer(args[0]), (1,), MODEL)[0]
        layers = carray(pointer(args[1]), (model.layers,), LAYER)
        like = np.zeros(1, storage)
        _step(model, layers, thread, threads, like)

    return on_all_threads(body)
