"""CPU kernel of `sandcat::stored_linear`. Shapes: see ops/stored_linear.py.

Each thread takes its share of the outputs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE
from sandcat.ops.numba.primitives.matrices import MATRIX, matrix, outputs_from
from sandcat.ops.numba.primitives.memory import columns, float32s, pointer, record, record_at
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, run_job, threads_of
from sandcat.ops.stored_linear import check_arguments, stored_linear
from sandcat.ops.weights import Stored

JOB = record("tokens x y", weight=MATRIX)
"""Addresses of x [T, I] and y [T, O]."""


@njit
def _share(job, thread, threads, like):
    """What a thread has to do."""
    tokens, outputs = job.tokens, job.weight.outputs
    x, y = float32s(job.x, (tokens, job.weight.inputs)), float32s(job.y, (tokens, outputs))
    first, end = outputs * thread // threads, outputs * (thread + 1) // threads
    outputs_from(job.weight, x, first, columns(y, first, end), np.empty(0, np.int32), like)


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


@stored_linear.register_kernel("cpu")
def _(x_TI: Tensor, weight: Stored) -> Tensor:
    check_arguments(x_TI, weight)
    y_TO = torch.empty(len(x_TI), len(weight.codes))
    run_job(
        _kernel(x_TI.dtype), JOB, threads_of(), tokens=len(x_TI), x=x_TI.float(), y=y_TO, weight=matrix(weight, "dots")
    )
    return y_TO
