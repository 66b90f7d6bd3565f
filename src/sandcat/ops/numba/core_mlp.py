"""CPU kernel of `sandcat::core_mlp`. Shapes: see ops/core_mlp.py.

Each thread takes its share of the neurons, 64 at a time, and of those that any token has it reads gate, up and down
rows, four at once. With several tokens a row is read once. Sums are float32; gate, up and their product are rounded to
the model's dtype as the reference rounds them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.core_mlp import check_arguments, core_mlp
from sandcat.ops.numba.primitives.activations import CODES, activate
from sandcat.ops.numba.primitives.dtypes import STORAGE, rounded, widen
from sandcat.ops.numba.primitives.rows import BLOCK, add_rows, dot_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of


@cache
def _kernel(dtype: torch.dtype, gate_dtype: torch.dtype, up_dtype: torch.dtype, down_dtype: torch.dtype):
    """The kernel for the model's dtype and the weights', compiled on first use (and then cached on disk)."""
    storage, gate_storage, up_storage, down_storage = (STORAGE[t] for t in (dtype, gate_dtype, up_dtype, down_dtype))
    unit, version = storage.type(0), VERSION

    def body(args, thread, threads):
        if args[8] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, neurons, hidden, code = args[9], args[10], args[11], args[12]
        x = carray(pointer(args[0]), (tokens, hidden), np.float32)
        gate = carray(pointer(args[1]), (neurons, hidden), gate_storage)
        up = carray(pointer(args[2]), (neurons, hidden), up_storage)
        down = carray(pointer(args[3]), (neurons, hidden), down_storage)
        core = carray(pointer(args[4]), (tokens, neurons), np.uint8)
        gate_bias = carray(pointer(args[5]), (neurons if args[5] else 0,), storage)
        up_bias = carray(pointer(args[6]), (neurons if args[6] else 0,), storage)
        gate_scale = carray(pointer(args[13]), (neurons if args[13] else 0,), storage)
        up_scale = carray(pointer(args[14]), (neurons if args[14] else 0,), storage)
        y = carray(pointer(args[7]), (threads, tokens, hidden), np.float32)[thread]
        kept = np.empty(BLOCK, np.int64)
        a = np.empty((tokens, BLOCK), np.float32)
        h = np.empty((tokens, BLOCK), np.float32)
        end = neurons * (thread + 1) // threads
        for start in range(neurons * thread // threads, end, BLOCK):
            count = 0
            for j in range(start, min(start + BLOCK, end)):
                wanted = False
                for t in range(tokens):
                    wanted |= core[t, j] != 0
                kept[count] = j
                count += wanted
            dot_rows(x, gate, kept, a[:, :count])
            dot_rows(x, up, kept, h[:, :count])
            for c in range(count):
                j = kept[c]
                for t in range(tokens):
                    g = a[t, c] * widen(gate_scale[j]) if gate_scale.size else a[t, c]
                    u = h[t, c] * widen(up_scale[j]) if up_scale.size else h[t, c]
                    g = g + widen(gate_bias[j]) if gate_bias.size else g
                    u = u + widen(up_bias[j]) if up_bias.size else u
                    g = rounded(activate(rounded(g, unit), code), unit)
                    h[t, c] = rounded(g * rounded(u, unit), unit) if core[t, j] else np.float32(0)
            add_rows(y, h[:, :count], down, kept)

    return on_all_threads(body)


@core_mlp.register_kernel("cpu")
def _(
    x_TH: Tensor,
    gate_IH: Tensor,
    up_IH: Tensor,
    down_IH: Tensor,
    core_TI: Tensor,
    activation: str,
    gate_bias_I: Tensor | None = None,
    up_bias_I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    gate_scale_I: Tensor | None = None,
    up_scale_I: Tensor | None = None,
    down_scale_H: Tensor | None = None,
) -> Tensor:
    scales = (gate_scale_I, up_scale_I, down_scale_H)
    check_arguments(x_TH, gate_IH, up_IH, down_IH, core_TI, gate_bias_I, up_bias_I, down_bias_H, *scales)
    tokens, hidden = x_TH.shape
    tensors = [x_TH.float(), gate_IH, up_IH, down_IH, core_TI, gate_bias_I, up_bias_I, gate_scale_I, up_scale_I]
    tensors = [None if t is None else t.contiguous() for t in tensors]
    threads = threads_of()
    partial_PTH = torch.zeros(threads, tokens, hidden)
    *addresses, gate_scale, up_scale = (0 if t is None else t.data_ptr() for t in tensors)
    _kernel(x_TH.dtype, gate_IH.dtype, up_IH.dtype, down_IH.dtype)(
        [*addresses, partial_PTH.data_ptr(), VERSION, tokens, gate_IH.shape[0], hidden, CODES[activation],
         gate_scale, up_scale], threads
    )  # fmt: skip
    y_TH = partial_PTH.sum(0) if down_scale_H is None else partial_PTH.sum(0) * down_scale_H
    return y_TH if down_bias_H is None else y_TH + down_bias_H
