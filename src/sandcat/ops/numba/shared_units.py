"""CPU kernels of `sandcat::shared_linear` and `sandcat::shared_up_down`. Shapes: see ops/shared_units.py.

Every thread makes the same list and takes its share of it. Four rows are read at once for four sequences at once, so
that a row comes from memory once and is widened once for four.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, rounded, widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.matrices import MATRIX, add_inputs, listed_outputs, matrix
from sandcat.ops.numba.primitives.memory import columns, float32s, numbers, part, pointer, record, record_at
from sandcat.ops.numba.primitives.rows import BLOCK
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, run_job, threads_of
from sandcat.ops.shared_units import shared_linear, shared_up_down
from sandcat.ops.sparse_linear import check_arguments as check_linear
from sandcat.ops.sparse_mlp import check_arguments as check_mlp
from sandcat.ops.weights import Stored

LINEAR_JOB = record("sequences x threshold y", weight=MATRIX)
"""Addresses of the arguments; y [threads, B, O]: each thread's sums."""
UP_DOWN_JOB = record("sequences x a threshold y", up=MATRIX, down=MATRIX)
"""The same; y [threads, B, H]."""


@njit
def _linear_share(job, thread, threads, like):
    """What a thread has to do."""
    B, channels, size = job.sequences, job.weight.inputs, job.weight.outputs
    x, threshold = float32s(job.x, (B, channels)), numbers(job.threshold, (channels,), like)
    y, units = float32s(job.y, (threads, B, size))[thread], np.empty(channels, np.int64)
    count = list_shared(x, threshold, units)
    first, end = count * thread // threads, count * (thread + 1) // threads
    values = np.empty((B, end - first), np.float32)
    for c in range(first, end):
        for b in range(B):
            values[b, c - first] = x[b, units[c]]
    add_inputs(job.weight, y, values, part(units, first, end), 0, np.empty(0, np.int32))


@njit
def _up_down_share(job, thread, threads, like):
    """What a thread has to do."""
    B, neurons, hidden = job.sequences, job.up.outputs, job.up.inputs
    x, a = float32s(job.x, (B, hidden)), numbers(job.a, (B, neurons), like)
    y, threshold = float32s(job.y, (threads, B, hidden))[thread], numbers(job.threshold, (neurons,), like)
    units, h, room = np.empty(neurons, np.int64), np.empty((B, BLOCK), np.float32), np.empty(0, np.int32)
    count = list_shared(a, threshold, units)
    end = count * (thread + 1) // threads
    for start in range(count * thread // threads, end, BLOCK):
        listed = part(units, start, min(start + BLOCK, end))
        values = columns(h, 0, listed.size)
        listed_outputs(job.up, x, listed, values, B, room, like)
        for c in range(listed.size):
            for b in range(B):
                h[b, c] = rounded(widen(a[b, listed[c]]) * rounded(h[b, c], like[0]), like[0])
        add_inputs(job.down, y, values, listed, 0, room)


@cache
def _linear_kernel(dtype: torch.dtype):
    """The kernel for the model's dtype, compiled on first use (and then cached on disk)."""
    storage, version = STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[1] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        like = carray(pointer(args[0]), (1,), storage)  # of which nobody reads the number
        _linear_share(record_at(args[0], LINEAR_JOB), thread, threads, like)

    return on_all_threads(body)


@cache
def _up_down_kernel(dtype: torch.dtype):
    storage, version = STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[1] != version:  # never: as above
            return
        like = carray(pointer(args[0]), (1,), storage)
        _up_down_share(record_at(args[0], UP_DOWN_JOB), thread, threads, like)

    return on_all_threads(body)


@shared_linear.register_kernel("cpu")
def _(x_BI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    check_linear(x_BI, weight, threshold_I)
    threads = threads_of()
    partial_PBO = torch.zeros(threads, len(x_BI), len(weight.codes))
    run_job(
        _linear_kernel(x_BI.dtype), LINEAR_JOB, threads, sequences=len(x_BI), x=x_BI.float(), threshold=threshold_I,
        y=partial_PBO, weight=matrix(weight, "sums"),
    )  # fmt: skip
    return outputs(partial_PBO.sum(0), weight)


@shared_up_down.register_kernel("cpu")
def _(x_BH: Tensor, a_BI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    check_mlp("shared_up_down", x_BH, None, a_BI, up, down, threshold_I)
    threads = threads_of()
    partial_PBH = torch.zeros(threads, *x_BH.shape)
    run_job(
        _up_down_kernel(x_BH.dtype), UP_DOWN_JOB, threads, sequences=len(x_BH), x=x_BH.float(), a=a_BI,
        threshold=threshold_I, y=partial_PBH, up=matrix(up, "listed_dots"), down=matrix(down, "sums"),
    )  # fmt: skip
    return outputs(partial_PBH.sum(0), down)
