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
from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, rounded, storage, unit_of, widen
from sandcat.ops.numba.primitives.rows import BLOCK, add_rows, dot_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of
from sandcat.ops.weights import Stored


@cache
def _kernel(dtype: torch.dtype, gate_format: str, up_format: str, down_format: str):
    """The kernel for the model's dtype and the weights' formats, compiled on first use (and then cached on disk)."""
    own, gate_unit, up_unit = STORAGE[dtype], unit_of(gate_format), unit_of(up_format)
    gate_storage, up_storage, down_storage = (storage(f, dtype) for f in (gate_format, up_format, down_format))
    like, version = own.type(0), VERSION

    def body(args, thread, threads):
        if args[8] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        tokens, neurons, hidden, code = args[9], args[10], args[11], args[12]
        x = carray(pointer(args[0]), (tokens, hidden), np.float32)
        gate = carray(pointer(args[1]), (neurons, hidden), gate_storage)
        up = carray(pointer(args[2]), (neurons, hidden), up_storage)
        down = carray(pointer(args[3]), (neurons, hidden), down_storage)
        core = carray(pointer(args[4]), (tokens, neurons), np.uint8)
        gate_bias = carray(pointer(args[5]), (neurons if args[5] else 0,), own)
        up_bias = carray(pointer(args[6]), (neurons if args[6] else 0,), own)
        gate_scale = carray(pointer(args[13]), (neurons if args[13] else 0,), own)
        up_scale = carray(pointer(args[14]), (neurons if args[14] else 0,), own)
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
                    g = a[t, c] * (widen(gate_scale[j]) * gate_unit) if gate_scale.size else a[t, c]
                    u = h[t, c] * (widen(up_scale[j]) * up_unit) if up_scale.size else h[t, c]
                    g = g + widen(gate_bias[j]) if gate_bias.size else g
                    u = u + widen(up_bias[j]) if up_bias.size else u
                    g = rounded(activate(rounded(g, like), code), like)
                    h[t, c] = rounded(g * rounded(u, like), like) if core[t, j] else np.float32(0)
            add_rows(y, h[:, :count], down, kept)

    return on_all_threads(body)


@core_mlp.register_kernel("cpu")
def _(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, core_TI: Tensor, activation: str) -> Tensor:
    check_arguments(x_TH, gate, up, down, core_TI)
    (tokens, hidden), neurons = x_TH.shape, len(gate.codes)
    tensors = [x_TH.float(), gate.codes, up.codes, down.codes.t(), core_TI, gate.bias, up.bias, gate.scale, up.scale]
    tensors = [None if t is None else t.contiguous() for t in tensors]
    threads = threads_of()
    partial_PTH = torch.zeros(threads, tokens, hidden)
    *addresses, gate_scale, up_scale = (0 if t is None else t.data_ptr() for t in tensors)
    _kernel(x_TH.dtype, gate.format, up.format, down.format)(
        [*addresses, partial_PTH.data_ptr(), VERSION, tokens, neurons, hidden, CODES[activation], gate_scale, up_scale],
        threads,
    )  # fmt: skip
    return outputs(partial_PTH.sum(0), down)
