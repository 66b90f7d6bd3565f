"""CPU kernels of `sandcat::sparse_mlp` and `sandcat::sparse_up_down`. Shapes: see ops/sparse_mlp.py.

Each thread takes its share of the neurons, 64 at a time: the gate rows stream through once; of the neurons that a
token keeps, the up and down rows follow, four at once, so that several rows are on their way from memory. A row that no
token keeps is never touched, and with several tokens a row is read from memory once. Sums are float32; gate, up and
their product are rounded to the model's dtype as the reference rounds them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from sandcat.ops.numba.primitives.activations import CODES, activate
from sandcat.ops.numba.primitives.dtypes import STORAGE, outputs, rounded, storage, unit_of, widen
from sandcat.ops.numba.primitives.rows import BLOCK, add_rows, dot_rows
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, pointer, threads_of
from sandcat.ops.sparse_mlp import check_arguments, sparse_mlp, sparse_up_down
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
        gate = carray(pointer(args[1]), (neurons if args[1] else 0, hidden), gate_storage)
        given = carray(pointer(args[13]), (tokens if args[13] else 0, neurons), own)
        up = carray(pointer(args[2]), (neurons, hidden), up_storage)
        down = carray(pointer(args[3]), (neurons, hidden), down_storage)
        threshold = carray(pointer(args[4]), (neurons,), own)
        gate_bias = carray(pointer(args[5]), (neurons if args[5] else 0,), own)
        up_bias = carray(pointer(args[6]), (neurons if args[6] else 0,), own)
        gate_scale = carray(pointer(args[14]), (neurons if args[14] else 0,), own)
        up_scale = carray(pointer(args[15]), (neurons if args[15] else 0,), own)
        y = carray(pointer(args[7]), (threads, tokens, hidden), np.float32)[thread]
        kept = np.empty(BLOCK, np.int64)
        keeps = np.empty((tokens, BLOCK), np.bool_)
        g = np.empty((tokens, BLOCK), np.float32)
        a = np.empty((tokens, BLOCK), np.float32)
        h = np.empty((tokens, BLOCK), np.float32)
        end = neurons * (thread + 1) // threads
        for start in range(neurons * thread // threads, end, BLOCK):
            stop, count = min(start + BLOCK, end), 0
            if gate.size:
                dot_rows(x, gate[start:stop], None, g[:, : stop - start])
            for j in range(start, stop):
                wanted = False
                for t in range(tokens):
                    if gate.size:
                        s = g[t, j - start] * (widen(gate_scale[j]) * gate_unit) if gate_scale.size else g[t, j - start]
                        s = s + widen(gate_bias[j]) if gate_bias.size else s
                        a[t, count] = rounded(activate(rounded(s, like), code), like)
                    else:
                        a[t, count] = widen(given[t, j])
                    keeps[t, count] = not abs(a[t, count]) <= widen(threshold[j])
                    wanted |= keeps[t, count]
                if wanted:
                    kept[count] = j
                    count += 1
            dot_rows(x, up, kept, h[:, :count])
            for c in range(count):
                for t in range(tokens):
                    u = h[t, c] * (widen(up_scale[kept[c]]) * up_unit) if up_scale.size else h[t, c]
                    u = u + widen(up_bias[kept[c]]) if up_bias.size else u
                    h[t, c] = rounded(a[t, c] * rounded(u, like), like) if keeps[t, c] else np.float32(0)
            add_rows(y, h[:, :count], down, kept)

    return on_all_threads(body)


def _run(
    x_TH: Tensor, gate: Stored | None, a_TI: Tensor | None, up: Stored, down: Stored, threshold_I: Tensor, code: int
) -> Tensor:
    (tokens, hidden), dtype = x_TH.shape, x_TH.dtype
    given = [None if gate is None else gate.codes, up.codes, down.codes.t(), threshold_I]
    gate = gate or Stored(x_TH)  # without bias and scale, and not read
    tensors = [x_TH.float(), *given, gate.bias, up.bias, a_TI, gate.scale, up.scale]
    tensors = [None if t is None else t.contiguous() for t in tensors]
    threads = threads_of()
    partial_PTH = torch.zeros(threads, tokens, hidden)
    *addresses, a, gate_scale, up_scale = (0 if t is None else t.data_ptr() for t in tensors)
    _kernel(dtype, gate.format, up.format, down.format)(
        [*addresses, partial_PTH.data_ptr(), VERSION, tokens, len(up.codes), hidden, code, a, gate_scale, up_scale],
        threads,
    )  # fmt: skip
    return outputs(partial_PTH.sum(0), down)


@sparse_mlp.register_kernel("cpu")
def _(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    check_arguments("sparse_mlp", x_TH, gate, None, up, down, threshold_I)
    return _run(x_TH, gate, None, up, down, threshold_I, CODES[activation])


@sparse_up_down.register_kernel("cpu")
def _(x_TH: Tensor, a_TI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    check_arguments("sparse_up_down", x_TH, None, a_TI, up, down, threshold_I)
    return _run(x_TH, None, a_TI, up, down, threshold_I, 0)
