"""CPU kernels of `sandcat::shared_linear` and `sandcat::shared_up_down`. Shapes: see ops/shared_units.py.

Every thread makes the same list and takes its share of it. Four rows are read at once for four sequences at once, so
that a row comes from memory once and is widened once for four.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, rounded, storage, unit_of, widen
from sandcat.ops.numba.primitives.lists import list_shared
from sandcat.ops.numba.primitives.rows import add_rows, dot_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of
from sandcat.ops.shared_units import shared_linear, shared_up_down
from sandcat.ops.sparse_linear import check_arguments as check_linear
from sandcat.ops.sparse_mlp import check_arguments as check_mlp
from sandcat.ops.weights import Stored

BLOCK = 64


@cache
def _linear_kernel(format: str, dtype: torch.dtype):
    """The kernel for weights of a format and one dtype, compiled on first use (and then cached on disk)."""
    weight_storage, own, version = storage(format, dtype), STORAGE[dtype], VERSION

    def body(args, thread, threads):
        if args[4] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        sequences, channels, size = args[5], args[6], args[7]
        x = carray(pointer(args[0]), (sequences, channels), np.float32)
        weight = carray(pointer(args[1]), (channels, size), weight_storage)
        threshold = carray(pointer(args[2]), (channels,), own)
        y = carray(pointer(args[3]), (threads, sequences, size), np.float32)[thread]
        units = np.empty(channels, np.int64)
        count = list_shared(x, threshold, units)
        first, end = count * thread // threads, count * (thread + 1) // threads
        values = np.empty((sequences, end - first), np.float32)
        for c in range(first, end):
            for b in range(sequences):
                values[b, c - first] = x[b, units[c]]
        add_rows(y, values, weight, units[first:end])

    return on_all_threads(body)


@shared_linear.register_kernel("cpu")
def _(x_BI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    check_linear(x_BI, weight, threshold_I)
    (sequences, channels), size = x_BI.shape, len(weight.codes)
    tensors = [x_BI.float().contiguous(), weight.codes.t().contiguous(), threshold_I.contiguous()]
    threads = threads_of()
    partial_PBO = torch.zeros(threads, sequences, size)
    addresses = [tensor.data_ptr() for tensor in (*tensors, partial_PBO)]
    _linear_kernel(weight.format, x_BI.dtype)([*addresses, VERSION, sequences, channels, size], threads)
    return outputs(partial_PBO.sum(0), weight)


@cache
def _up_down_kernel(dtype: torch.dtype, up_format: str, down_format: str):
    """The kernel for the model's dtype and the weights' formats, compiled on first use (and then cached on disk)."""
    own, up_storage, down_storage = STORAGE[dtype], storage(up_format, dtype), storage(down_format, dtype)
    up_unit, like, version = unit_of(up_format), own.type(0), VERSION

    def body(args, thread, threads):
        if args[8] != version:  # never: as above
            return
        sequences, neurons, hidden = args[9], args[10], args[11]
        x = carray(pointer(args[0]), (sequences, hidden), np.float32)
        a = carray(pointer(args[1]), (sequences, neurons), own)
        up = carray(pointer(args[2]), (neurons, hidden), up_storage)
        down = carray(pointer(args[3]), (neurons, hidden), down_storage)
        threshold = carray(pointer(args[4]), (neurons,), own)
        up_bias = carray(pointer(args[5]), (neurons if args[5] else 0,), own)
        up_scale = carray(pointer(args[6]), (neurons if args[6] else 0,), own)
        y = carray(pointer(args[7]), (threads, sequences, hidden), np.float32)[thread]
        units = np.empty(neurons, np.int64)
        count = list_shared(a, threshold, units)
        h = np.empty((sequences, BLOCK), np.float32)
        end = count * (thread + 1) // threads
        for start in range(count * thread // threads, end, BLOCK):
            block = units[start : min(start + BLOCK, end)]
            dot_rows(x, up, block, h[:, : block.size])
            for c in range(block.size):
                j = block[c]
                for b in range(sequences):
                    u = h[b, c] * (widen(up_scale[j]) * up_unit) if up_scale.size else h[b, c]
                    u = u + widen(up_bias[j]) if up_bias.size else u
                    h[b, c] = rounded(widen(a[b, j]) * rounded(u, like), like)
            add_rows(y, h[:, : block.size], down, block)

    return on_all_threads(body)


@shared_up_down.register_kernel("cpu")
def _(x_BH: Tensor, a_BI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    check_mlp("shared_up_down", x_BH, None, a_BI, up, down, threshold_I)
    (sequences, hidden), neurons = x_BH.shape, len(up.codes)
    tensors = [x_BH.float(), a_BI, up.codes, down.codes.t(), threshold_I, up.bias, up.scale]
    tensors = [None if t is None else t.contiguous() for t in tensors]
    threads = threads_of()
    partial_PBH = torch.zeros(threads, sequences, hidden)
    addresses = [0 if t is None else t.data_ptr() for t in (*tensors, partial_PBH)]
    _up_down_kernel(x_BH.dtype, up.format, down.format)([*addresses, VERSION, sequences, neurons, hidden], threads)
    return outputs(partial_PBH.sum(0), down)
