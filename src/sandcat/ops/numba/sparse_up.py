"""CPU kernel of `sandcat::sparse_up`. Shapes: see ops/sparse_mlp.py.

Each thread takes its share of the neurons, 64 at a time, and multiplies the rows of those that any token keeps, four
at once. A row that none keeps is never touched.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE, widen
from sandcat.ops.numba.primitives.matrices import MATRIX, listed_outputs, matrix
from sandcat.ops.numba.primitives.memory import columns, float32s, numbers, part, pointer, record, record_at
from sandcat.ops.numba.primitives.rows import BLOCK
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, run_job, threads_of
from sandcat.ops.sparse_up import check_arguments, sparse_up
from sandcat.ops.weights import Stored

JOB = record("tokens x a threshold u", up=MATRIX)
"""Addresses of the arguments, and of what comes out, u [T, I]."""


@njit
def _share(job, thread, threads, like):
    """What a thread has to do."""
    tokens, neurons, hidden = job.tokens, job.up.outputs, job.up.inputs
    x, u = float32s(job.x, (tokens, hidden)), float32s(job.u, (tokens, neurons))
    a, threshold = numbers(job.a, (tokens, neurons), like), numbers(job.threshold, (neurons,), like)
    kept, out, room = np.empty(BLOCK, np.int64), np.empty((tokens, BLOCK), np.float32), np.empty(0, np.int32)
    end = neurons * (thread + 1) // threads
    for start in range(neurons * thread // threads, end, BLOCK):
        count = 0
        for j in range(start, min(start + BLOCK, end)):
            wanted = False
            for t in range(tokens):
                u[t, j] = 0
                wanted |= not abs(widen(a[t, j])) <= widen(threshold[j])
            kept[count] = j
            count += wanted
        listed_outputs(job.up, x, part(kept, 0, count), columns(out, 0, count), tokens, room, like)
        for c in range(count):
            j = kept[c]
            for t in range(tokens):
                if not abs(widen(a[t, j])) <= widen(threshold[j]):
                    u[t, j] = out[t, c]


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


@sparse_up.register_kernel("cpu")
def _(x_TH: Tensor, a_TI: Tensor, up: Stored, threshold_I: Tensor) -> Tensor:
    check_arguments(x_TH, a_TI, up, threshold_I)
    u_TI = torch.empty(len(x_TH), len(up.codes))
    run_job(
        _kernel(x_TH.dtype), JOB, threads_of(), tokens=len(x_TH), x=x_TH.float(), a=a_TI, threshold=threshold_I, u=u_TI,
        up=matrix(up, "listed_dots"),
    )  # fmt: skip
    return u_TI.to(x_TH.dtype)
