"""The gated neurons of a decode step on a CPU. Shapes: as in linears.py, I neurons."""

from __future__ import annotations

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.activations import activate_all
from sandcat.ops.numba.primitives.dtypes import rounded, widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.matrices import listed_outputs
from sandcat.ops.numba.primitives.memory import block, clear, columns, numbers, part, piece
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.numba.step.barrier import barrier
from sandcat.ops.numba.step.linears import begin, finish, keep_above, keep_any, keep_one, pack

BLOCK = 64
"""Neurons whose gates are computed before the rows of those that are kept, for one sequence."""


@njit
def activations(g, first, end, code, work):
    """g[:, first:end] = its activations."""
    apart()
    for b in range(work.B):
        activate_all(piece(g, b, first, end), code, work.like[0])


@njit
def _multiply(layer, x, a, threshold, count, work, hidden):
    """hidden = a * up(x) of the listed neurons, 0 where a sequence does not keep one."""
    like, own, kept, values = work.like[0], not layer.shared, part(work.kept, 0, count), columns(work.values, 0, count)
    listed_outputs(layer.up, columns(x, 0, layer.up.inputs), kept, values, work.B, work.room, work.like)
    for b in range(work.B):
        for c in range(count):
            j = kept[c]
            value = rounded(a[b, j] * rounded(values[b, c], like), like)
            if own and abs(a[b, j]) <= widen(threshold[j]):
                value = np.float32(0)
            hidden[b, j] = value


@njit
def _kept_neurons(layer, x, a, first, end, work, hidden):
    """hidden[:, first:end] = a * up(x), where |a| is above the threshold; else 0, and the row is not read."""
    apart()
    threshold = numbers(layer.neuron_threshold, (layer.neurons,), work.like)
    clear(hidden, first, end)
    if work.B == 1:
        row, values = piece(a, 0, 0, layer.neurons), piece(work.values, 0, 0, layer.neurons)
        count = keep_one(row, threshold, first, end, work.kept, values)
    else:
        count = keep_any(a, threshold, first, end, work)
    _multiply(layer, x, a, threshold, count, work, hidden)


@njit
def _shared_neurons(layer, x, a, first, end, work, hidden):
    """The same, of the neurons that all sequences share."""
    apart()
    threshold, kept = numbers(layer.neuron_threshold, (layer.neurons,), work.like), work.kept
    clear(hidden, first, end)
    barrier()
    count = list_shared(block(a, work.B, 0, layer.neurons), threshold, kept)
    first, end = count * work.thread // work.threads, count * (work.thread + 1) // work.threads
    for c in range(first, end):
        kept[c - first] = kept[c]
    _multiply(layer, x, a, threshold, end - first, work, hidden)


@njit
def _mask_shared(layer, a, first, end, work, hidden):
    """hidden[:, first:end] = 0 of the neurons that the sequences do not share."""
    apart()
    threshold, wanted = numbers(layer.neuron_threshold, (layer.neurons,), work.like), work.wanted
    barrier()
    count = list_shared(block(a, work.B, 0, layer.neurons), threshold, work.kept)
    for j in range(layer.neurons):
        wanted[j] = False
    for c in range(count):
        wanted[work.kept[c]] = True
    for b in range(work.B):
        for j in range(first, end):
            if not wanted[j]:
                hidden[b, j] = 0


@njit
def _all_neurons(layer, a, first, end, work, hidden):
    """hidden[:, first:end], which is up(x), *= a; what is masked counts as 0."""
    apart()
    for b in range(work.B):
        a_b, hidden_b = piece(a, b, first, end), piece(hidden, b, first, end)
        for j in range(hidden_b.size):
            hidden_b[j] = rounded(a_b[j] * rounded(hidden_b[j], work.like[0]), work.like[0])
        if layer.masks and not layer.shared:
            threshold = numbers(layer.neuron_threshold, (layer.neurons,), work.like)
            keep_above(hidden_b, a_b, part(threshold, first, end), hidden_b)
    if layer.masks and layer.shared:
        _mask_shared(layer, a, first, end, work, hidden)


@njit(inline="always")
def neurons(layer, x, a, first, end, work, hidden):
    """hidden[:, first:end] = activation(gate(x)) * up(x)."""
    gate, up = layer.gate, layer.up
    if not (gate.by_inputs and up.by_inputs):
        pack(gate, x, work)
    in_blocks = layer.skips and not layer.shared and work.B == 1 and not gate.by_inputs  # which take no barrier
    step = BLOCK if in_blocks else max(1, end - first)
    for at in range(first, max(end, first + 1), step):
        to = min(end, at + step)
        begin(gate, x, at, to, a, work)
        if not layer.skips:
            begin(up, x, at, to, hidden, work)
        if gate.summed or (up.summed and not layer.skips):
            barrier()
        finish(gate, at, to, a, work)
        activations(a, at, to, layer.activation, work)
        if not layer.skips:
            finish(up, at, to, hidden, work)
            _all_neurons(layer, a, at, to, work, hidden)
        elif layer.shared:
            _shared_neurons(layer, x, a, at, to, work, hidden)
        else:
            _kept_neurons(layer, x, a, at, to, work, hidden)
