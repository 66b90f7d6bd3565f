"""CPU kernel of `sandcat::core_mlp`. Shapes: see ops/core_mlp.py.

Each thread takes its share of the neurons, 64 at a time, and of those that any token has it reads gate, up and down
rows, four at once. With several tokens a row is read once. Sums are float32; gate, up and their product are rounded to
the model's dtype as the reference rounds them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.core_mlp import check_arguments, core_mlp
from sandcat.ops.numba.primitives.activations import CODES, activate
from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, rounded
from sandcat.ops.numba.primitives.matrices import MATRIX, add_inputs, listed_outputs, matrix
from sandcat.ops.numba.primitives.memory import columns, float32s, part, pointer, record, record_at
from sandcat.ops.numba.primitives.rows import BLOCK
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, run_job, threads_of
from sandcat.ops.weights import Stored

JOB = record("tokens x core activation y", gate=MATRIX, up=MATRIX, down=MATRIX)
"""Addresses of the arguments; y [threads, T, H]: each thread's sums."""


@njit
def _share(job, thread, threads, like):
    """What a thread has to do."""
    tokens, neurons, hidden = job.tokens, job.up.outputs, job.up.inputs
    x, y = float32s(job.x, (tokens, hidden)), float32s(job.y, (threads, tokens, hidden))[thread]
    core, kept = carray(pointer(job.core), (tokens, neurons), np.uint8), np.empty(BLOCK, np.int64)
    g, h = np.empty((tokens, BLOCK), np.float32), np.empty((tokens, BLOCK), np.float32)
    room, end = np.empty(0, np.int32), neurons * (thread + 1) // threads
    for start in range(neurons * thread // threads, end, BLOCK):
        count = 0
        for j in range(start, min(start + BLOCK, end)):
            wanted = False
            for t in range(tokens):
                wanted |= core[t, j] != 0
            kept[count] = j
            count += wanted
        units, values = part(kept, 0, count), columns(h, 0, count)
        listed_outputs(job.gate, x, units, columns(g, 0, count), tokens, room, like)
        listed_outputs(job.up, x, units, values, tokens, room, like)
        for c in range(count):
            for t in range(tokens):
                a = rounded(activate(rounded(g[t, c], like[0]), job.activation), like[0])
                value = rounded(a * rounded(h[t, c], like[0]), like[0])
                h[t, c] = value if core[t, kept[c]] else np.float32(0)
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


@core_mlp.register_kernel("cpu")
def _(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, core_TI: Tensor, activation: str) -> Tensor:
    check_arguments(x_TH, gate, up, down, core_TI)
    threads = threads_of()
    partial_PTH = torch.zeros(threads, *x_TH.shape)
    run_job(
        _kernel(x_TH.dtype), JOB, threads, tokens=len(x_TH), x=x_TH.float(), core=core_TI, activation=CODES[activation],
        y=partial_PTH, gate=matrix(gate, "listed_dots"), up=matrix(up, "listed_dots"), down=matrix(down, "sums"),
    )  # fmt: skip
    return outputs(partial_PTH.sum(0), down)
