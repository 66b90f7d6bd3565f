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

from sandcat.ops.numba.primitives.dtypes import STORAGE, widen
from sandcat.ops.numba.primitives.rows import add_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of
from sandcat.ops.sparse_linear import check_arguments, sparse_linear


@cache
def _kernel(weight_dtype: torch.dtype, dtype: torch.dtype):
    """The kernel for weights and thresholds of these dtypes, compiled on first use (and then cached on disk)."""
    weight_storage, storage, version = STORAGE[weight_dtype], STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[4] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, channels, outputs = args[5], args[6], args[7]
        x = carray(pointer(args[0]), (tokens, channels), np.float32)
        weight = carray(pointer(args[1]), (channels, outputs), weight_storage)
        threshold = carray(pointer(args[2]), (channels,), storage)
        y = carray(pointer(args[3]), (threads, tokens, outputs), np.float32)[thread]
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
def _(
    x_TI: Tensor,
    weight_IO: Tensor,
    threshold_I: Tensor,
    bias_O: Tensor | None = None,
    scale_O: Tensor | None = None,
) -> Tensor:
    check_arguments(x_TI, weight_IO, threshold_I, bias_O, scale_O)
    (tokens, channels), outputs = x_TI.shape, weight_IO.shape[1]
    tensors = [x_TI.float().contiguous(), weight_IO.contiguous(), threshold_I.contiguous()]
    threads = threads_of()
    partial_PTO = torch.zeros(threads, tokens, outputs)
    addresses = [tensor.data_ptr() for tensor in (*tensors, partial_PTO)]
    _kernel(weight_IO.dtype, x_TI.dtype)([*addresses, VERSION, tokens, channels, outputs], threads)
    y_TO = partial_PTO.sum(0) if scale_O is None else partial_PTO.sum(0) * scale_O
    return y_TO if bias_O is None else y_TO + bias_O
