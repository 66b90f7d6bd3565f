"""CPU kernels of `sandcat::mask` and `sandcat::drop_up` (ops/masks.py): one pass, comparing floats by their bits.

Floats of one sign are in the order of their bits, and LLVM compares 16-bit integers thirty-two at a time, which
neither PyTorch nor its compiler does. (Nor LLVM where an index may be negative: so arrays begin at a thread's share of
the columns.)
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.numba.primitives.memory import pointer
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, threads_of

PARALLEL = 2**14
"""Numbers of a mask from which more than one thread pays."""


@cache
def _mask_kernel(itemsize: int):
    storage, version, size = np.dtype(f"i{itemsize}"), VERSION, 2 ** (8 * itemsize - 1) - 1

    def body(args, thread, threads):
        if args[3] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, columns = args[4], args[5]
        start = columns * thread // threads
        share = columns * (thread + 1) // threads - start
        threshold = carray(pointer(args[1] + start * itemsize), (share,), storage)
        for t in range(tokens):
            at = (t * columns + start) * itemsize
            x = carray(pointer(args[0] + at), (share,), storage)
            y = carray(pointer(args[2] + at), (share,), storage)
            for j in range(share):
                y[j] = x[j] if (x[j] & size) > threshold[j] else 0

    return on_all_threads(body)


def mask(x_TI: Tensor, threshold_I: Tensor) -> Tensor:
    """See ops/masks.py; ValueError if sizes or dtypes do not go together."""
    tokens, columns = x_TI.shape
    if threshold_I.shape != (columns,) or threshold_I.dtype != x_TI.dtype or not threshold_I.is_contiguous():
        raise ValueError(f"sandcat::mask: {threshold_I.shape} {threshold_I.dtype} for {x_TI.shape} {x_TI.dtype}.")
    x_TI = x_TI.contiguous()
    y_TI = torch.empty_like(x_TI)
    args = [x_TI.data_ptr(), threshold_I.data_ptr(), y_TI.data_ptr(), VERSION, tokens, columns]
    _mask_kernel(x_TI.itemsize)(args, threads_of() if tokens * columns > PARALLEL else 1)
    return y_TI


@cache
def _drop_up_kernel(itemsize: int):
    storage, version, sign = np.dtype(f"i{itemsize}"), VERSION, 8 * itemsize - 1
    size = 2**sign - 1

    def body(args, thread, threads):
        if args[2] != version:  # as above
            return
        tokens, neurons = args[3], args[4]
        start = neurons * thread // threads
        share = neurons * (thread + 1) // threads - start
        above = carray(pointer(args[1] + start * itemsize), (share,), storage)
        low = carray(pointer(args[1] + (neurons + start) * itemsize), (share,), storage)
        high = carray(pointer(args[1] + (2 * neurons + start) * itemsize), (share,), storage)
        for t in range(tokens):
            at = (2 * t * neurons + start) * itemsize
            gate = carray(pointer(args[0] + at), (share,), storage)
            up = carray(pointer(args[0] + at + neurons * itemsize), (share,), storage)
            for j in range(share):
                place = gate[j] ^ ((gate[j] >> sign) & size)
                if not ((place > above[j]) | ((place > low[j]) & (place < high[j]))):
                    up[j] = 0

    return on_all_threads(body)


def drop_up(y_T2I: Tensor, bounds_3I: Tensor) -> None:
    """See ops/masks.py; ValueError as well where y or the bounds are not contiguous."""
    tokens, neurons = len(y_T2I), y_T2I.shape[-1] // 2
    if bounds_3I.shape != (3, neurons) or bounds_3I.itemsize != y_T2I.itemsize:
        raise ValueError(f"sandcat::drop_up: {bounds_3I.shape} {bounds_3I.dtype} for {y_T2I.shape} {y_T2I.dtype}.")
    if not (y_T2I.is_contiguous() and bounds_3I.is_contiguous()):
        raise ValueError("sandcat::drop_up works in place, on contiguous memory.")
    args = [y_T2I.data_ptr(), bounds_3I.data_ptr(), VERSION, tokens, neurons]
    _drop_up_kernel(y_T2I.itemsize)(args, threads_of() if tokens * neurons > PARALLEL else 1)
