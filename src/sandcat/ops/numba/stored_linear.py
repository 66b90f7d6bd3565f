"""CPU kernel of `sandcat::stored_linear`. Shapes: see ops/stored_linear.py.

Each thread takes its share of the outputs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE, storage, unit_of, widen
from sandcat.ops.numba.primitives.rows import dot_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of
from sandcat.ops.stored_linear import check_arguments, stored_linear
from sandcat.ops.weights import Stored


@cache
def _kernel(format: str, dtype: torch.dtype):
    """The kernel for weights of a format and one dtype, compiled on first use (and then cached on disk)."""
    weight_storage, scale_storage, unit, version = storage(format, dtype), STORAGE[dtype], unit_of(format), VERSION

    def body(args, thread, threads):
        if args[4] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, channels, outputs = args[5], args[6], args[7]
        x = carray(pointer(args[0]), (tokens, channels), np.float32)
        weight = carray(pointer(args[1]), (outputs, channels), weight_storage)
        scale = carray(pointer(args[2]), (outputs,), scale_storage)
        y = carray(pointer(args[3]), (tokens, outputs), np.float32)
        first, end = outputs * thread // threads, outputs * (thread + 1) // threads
        dot_rows(x, weight[first:end], None, y[:, first:end])
        for t in range(tokens):
            for o in range(first, end):
                y[t, o] *= widen(scale[o]) * unit

    return on_all_threads(body)


@stored_linear.register_kernel("cpu")
def _(x_TI: Tensor, weight: Stored) -> Tensor:
    check_arguments(x_TI, weight)
    assert weight.scale is not None
    (tokens, channels), outputs = x_TI.shape, len(weight.codes)
    y_TO = torch.empty(tokens, outputs)
    tensors = [x_TI.float().contiguous(), weight.codes.contiguous(), weight.scale.contiguous(), y_TO]
    addresses = [tensor.data_ptr() for tensor in tensors]
    _kernel(weight.format, x_TI.dtype)([*addresses, VERSION, tokens, channels, outputs], threads_of())
    return y_TO if weight.bias is None else y_TO + weight.bias
