"""CPU kernel of `sandcat::sparse_linear`. Shapes: see ops/sparse_linear.py.

Each thread takes its share of the channels that a token keeps, and adds their rows, four at once, into sums of its own:
rows are read whole and in order, so that memory streams, and a dropped channel's row is never touched.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, storage, widen
from sandcat.ops.numba.primitives.rows import add_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of
from sandcat.ops.sparse_linear import check_arguments, sparse_linear
from sandcat.ops.weights import Stored


@cache
def _kernel(format: str, dtype: torch.dtype):
    """The kernel for weights of a format and one dtype, compiled on first use (and then cached on disk)."""
    weight_storage, threshold_storage, version = storage(format, dtype), STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[4] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, channels, size = args[5], args[6], args[7]
        x = carray(pointer(args[0]), (tokens, channels), np.float32)
        weight = carray(pointer(args[1]), (channels, size), weight_storage)
        threshold = carray(pointer(args[2]), (channels,), threshold_storage)
        y = carray(pointer(args[3]), (threads, tokens, size), np.float32)[thread]
        kept = np.empty(channels, np.int64)
        values = np.empty(channels, np.float32)
        for t in range(tokens):
            count = 0
            for i in range(channels):
                kept[count] = i
                values[count] = x[t, i]
                count += not abs(x[t, i]) <= widen(threshold[i])
            first, end = count * thread // threads, count * (thread + 1) // threads
            add_rows(y[t : t + 1], values[first:end].reshape(1, -1), weight, kept[first:end])

    return on_all_threads(body)


@sparse_linear.register_kernel("cpu")
def _(x_TI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    check_arguments(x_TI, weight, threshold_I)
    (tokens, channels), size = x_TI.shape, len(weight.codes)
    tensors = [x_TI.float().contiguous(), weight.codes.t().contiguous(), threshold_I.contiguous()]
    threads = threads_of()
    partial_PTO = torch.zeros(threads, tokens, size)
    addresses = [tensor.data_ptr() for tensor in (*tensors, partial_PTO)]
    _kernel(weight.format, x_TI.dtype)([*addresses, VERSION, tokens, channels, size], threads)
    return outputs(partial_PTO.sum(0), weight)
