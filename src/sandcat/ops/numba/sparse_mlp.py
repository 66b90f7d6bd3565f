"""CPU kernels of `sandcat::sparse_mlp` and `sandcat::sparse_up_down`. Shapes: see ops/sparse_mlp.py.

Each thread takes its share of the neurons, 64 at a time: the gate rows stream through once; of the neurons that a
token keeps, the up and down rows follow, four at once, so that several rows are on their way from memory. A row that no
token keeps is never touched, and with several tokens a row is read from memory once. Sums are float32; gate, up and
their product are rounded to the model's dtype as the reference rounds them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.numba.primitives.activations import CODES, activate
from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, rounded, widen
from sandcat.ops.numba.primitives.matrices import MATRIX, add_inputs, listed_outputs, matrix, outputs_from
from sandcat.ops.numba.primitives.memory import columns, float32s, numbers, part, pointer, record, record_at
from sandcat.ops.numba.primitives.rows import BLOCK
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, run_job, threads_of
from sandcat.ops.sparse_mlp import check_arguments, sparse_mlp, sparse_up_down
from sandcat.ops.weights import Stored

JOB = record("tokens x a threshold activation y", gate=MATRIX, up=MATRIX, down=MATRIX)
"""Addresses of the arguments, of gate or a one; y [threads, T, H]: each thread's sums."""


@njit
def _share(job, thread, threads, like):
    """What a thread has to do."""
    tokens, neurons, hidden = job.tokens, job.up.outputs, job.up.inputs
    x, y = float32s(job.x, (tokens, hidden)), float32s(job.y, (threads, tokens, hidden))[thread]
    given, threshold = numbers(job.a, (tokens if job.a else 0, neurons), like), numbers(job.threshold, (neurons,), like)
    kept, keeps, room = np.empty(BLOCK, np.int64), np.empty((tokens, BLOCK), np.bool_), np.empty(0, np.int32)
    g, a = np.empty((tokens, BLOCK), np.float32), np.empty((tokens, BLOCK), np.float32)
    h = np.empty((tokens, BLOCK), np.float32)
    end = neurons * (thread + 1) // threads
    for start in range(neurons * thread // threads, end, BLOCK):
        stop, count = min(start + BLOCK, end), 0
        if job.gate.weight:
            outputs_from(job.gate, x, start, columns(g, 0, stop - start), room, like)
        for j in range(start, stop):
            wanted = False
            for t in range(tokens):
                if job.gate.weight:
                    a[t, count] = rounded(activate(rounded(g[t, j - start], like[0]), job.activation), like[0])
                else:
                    a[t, count] = widen(given[t, j])
                keeps[t, count] = not abs(a[t, count]) <= widen(threshold[j])
                wanted |= keeps[t, count]
            if wanted:
                kept[count] = j
                count += 1
        units, values = part(kept, 0, count), columns(h, 0, count)
        listed_outputs(job.up, x, units, values, tokens, room, like)
        for c in range(count):
            for t in range(tokens):
                value = rounded(a[t, c] * rounded(h[t, c], like[0]), like[0])
                h[t, c] = value if keeps[t, c] else np.float32(0)
        add_inputs(job.down, y, values, units, 0, room)


@cache
def _kernel(dtype: torch.dtype):
    """The kernel for the model's dtype, compiled on first use (and then cached on disk)."""
    storage, version = STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[1] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        like = carray(pointer(args[0]), (1,), storage)  # of which nobody reads the number
        _share(record_at(args[0], JOB), thread, threads, like)

    return on_all_threads(body)


def _run(
    x_TH: Tensor, gate: Stored | None, a_TI: Tensor | None, up: Stored, down: Stored, threshold_I: Tensor, code: int
) -> Tensor:
    threads = threads_of()
    partial_PTH = torch.zeros(threads, *x_TH.shape)
    run_job(
        _kernel(x_TH.dtype), JOB, threads, tokens=len(x_TH), x=x_TH.float(), a=a_TI, threshold=threshold_I,
        activation=code, y=partial_PTH, gate=matrix(gate, "dots") if gate else {}, up=matrix(up, "listed_dots"),
        down=matrix(down, "sums"),
    )  # fmt: skip
    return outputs(partial_PTH.sum(0), down)


@sparse_mlp.register_kernel("cpu")
def _(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    check_arguments("sparse_mlp", x_TH, gate, None, up, down, threshold_I)
    return _run(x_TH, gate, None, up, down, threshold_I, CODES[activation])


@sparse_up_down.register_kernel("cpu")
def _(x_TH: Tensor, a_TI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    check_arguments("sparse_up_down", x_TH, None, a_TI, up, down, threshold_I)
    return _run(x_TH, None, a_TI, up, down, threshold_I, 0)
