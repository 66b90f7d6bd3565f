"""CPU kernel of `sandcat::sparse_linear`. Shapes: see ops/sparse_linear.py.

Each thread takes its share of the channels that a token keeps, and adds their rows, four at once, into sums of its own:
rows are read whole and in order, so that memory streams, and a dropped channel's row is never touched.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, widen
from sandcat.ops.numba.primitives.matrices import MATRIX, add_inputs, matrix
from sandcat.ops.numba.primitives.memory import columns, float32s, numbers, part, pointer, record, record_at
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, run_job, threads_of
from sandcat.ops.sparse_linear import check_arguments, sparse_linear
from sandcat.ops.weights import Stored

JOB = record("tokens x threshold y", weight=MATRIX)
"""Addresses of the arguments; y [threads, T, O]: each thread's sums."""


@njit
def _share(job, thread, threads, like):
    """What a thread has to do."""
    tokens, channels, size = job.tokens, job.weight.inputs, job.weight.outputs
    x, threshold = float32s(job.x, (tokens, channels)), numbers(job.threshold, (channels,), like)
    y = float32s(job.y, (threads * tokens, 1, size))
    kept, values, room = np.empty(channels, np.int64), np.empty((1, channels), np.float32), np.empty(0, np.int32)
    for t in range(tokens):
        count = 0
        for i in range(channels):
            kept[count] = i
            values[0, count] = x[t, i]
            count += not abs(x[t, i]) <= widen(threshold[i])
        first, end = count * thread // threads, count * (thread + 1) // threads
        add_inputs(job.weight, y[thread * tokens + t], columns(values, first, end), part(kept, first, end), 0, room)


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


@sparse_linear.register_kernel("cpu")
def _(x_TI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    check_arguments(x_TI, weight, threshold_I)
    threads = threads_of()
    partial_PTO = torch.zeros(threads, len(x_TI), len(weight.codes))
    run_job(
        _kernel(x_TI.dtype), JOB, threads, tokens=len(x_TI), x=x_TI.float(), threshold=threshold_I, y=partial_PTO,
        weight=matrix(weight, "sums"),
    )  # fmt: skip
    return outputs(partial_PTO.sum(0), weight)
