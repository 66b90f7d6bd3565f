"""CPU kernel of `sandcat::sparse_up`. Shapes: see ops/sparse_mlp.py.

Each thread takes its share of the neurons, 64 at a time, and multiplies the rows of those that any token keeps, four
at once. A row that none keeps is never touched.
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
from sandcat.ops.sparse_up import check_arguments, sparse_up
from sandcat.ops.weights import Stored

BLOCK = 64


@cache
def _kernel(dtype: torch.dtype, format: str):
    """The kernel for the model's dtype and the weight's format, compiled on first use (and then cached on disk)."""
    own, up_storage, unit, version = STORAGE[dtype], storage(format, dtype), unit_of(format), VERSION

    def body(args, thread, threads):
        if args[7] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, neurons, hidden = args[8], args[9], args[10]
        x = carray(pointer(args[0]), (tokens, hidden), np.float32)
        a = carray(pointer(args[1]), (tokens, neurons), own)
        up = carray(pointer(args[2]), (neurons, hidden), up_storage)
        threshold = carray(pointer(args[3]), (neurons,), own)
        bias = carray(pointer(args[4]), (neurons if args[4] else 0,), own)
        scale = carray(pointer(args[5]), (neurons if args[5] else 0,), own)
        u = carray(pointer(args[6]), (tokens, neurons), np.float32)
        kept = np.empty(BLOCK, np.int64)
        out = np.empty((tokens, BLOCK), np.float32)
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
            dot_rows(x, up, kept, out[:, :count])
            for c in range(count):
                j = kept[c]
                for t in range(tokens):
                    if not abs(widen(a[t, j])) <= widen(threshold[j]):
                        s = out[t, c] * (widen(scale[j]) * unit) if scale.size else out[t, c]
                        u[t, j] = s + widen(bias[j]) if bias.size else s

    return on_all_threads(body)


@sparse_up.register_kernel("cpu")
def _(x_TH: Tensor, a_TI: Tensor, up: Stored, threshold_I: Tensor) -> Tensor:
    check_arguments(x_TH, a_TI, up, threshold_I)
    (tokens, hidden), neurons = x_TH.shape, len(up.codes)
    tensors = [t if t is None else t.contiguous() for t in (a_TI, up.codes, threshold_I, up.bias, up.scale)]
    tensors = [x_TH.float().contiguous(), *tensors, torch.empty(tokens, neurons)]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    _kernel(x_TH.dtype, up.format)([*addresses, VERSION, tokens, neurons, hidden], threads_of())
    return tensors[-1].to(x_TH.dtype)
