"""CPU kernel of `sandcat::int8_linear`. Shapes: see ops/int8_linear.py.

Each thread takes its share of the outputs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.int8_linear import check_arguments, int8_linear
from sandcat.ops.numba.primitives.dtypes import STORAGE, widen
from sandcat.ops.numba.primitives.rows import dot_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of


@cache
def _kernel(dtype: torch.dtype):
    """The kernel for scales of one dtype, compiled on first use (and then cached on disk)."""
    storage, version = STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[4] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, channels, outputs = args[5], args[6], args[7]
        x = carray(pointer(args[0]), (tokens, channels), np.float32)
        weight = carray(pointer(args[1]), (outputs, channels), np.int8)
        scale = carray(pointer(args[2]), (outputs,), storage)
        y = carray(pointer(args[3]), (tokens, outputs), np.float32)
        first, end = outputs * thread // threads, outputs * (thread + 1) // threads
        dot_rows(x, weight[first:end], None, y[:, first:end])
        for t in range(tokens):
            for o in range(first, end):
                y[t, o] *= widen(scale[o])

    return on_all_threads(body)


@int8_linear.register_kernel("cpu")
def _(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    check_arguments(x_TI, weight_OI, scale_O, bias_O)
    (tokens, channels), outputs = x_TI.shape, weight_OI.shape[0]
    y_TO = torch.empty(tokens, outputs)
    tensors = [x_TI.float().contiguous(), weight_OI.contiguous(), scale_O.contiguous(), y_TO]
    addresses = [tensor.data_ptr() for tensor in tensors]
    _kernel(x_TI.dtype)([*addresses, VERSION, tokens, channels, outputs], threads_of())
    return y_TO if bias_O is None else y_TO + bias_O
