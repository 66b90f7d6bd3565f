"""Runs the Triton kernels on the CPU by Triton's interpreter and compares them with the reference.

A program of its own, because the interpreter is chosen when the kernels are imported: `test_triton_interpreted.py` runs
it. It checks what the kernels compute, not what a GPU makes of them: the `gpu` tests do that.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import assert_close
from test_sparse_mlp import arguments, expected

import sandcat.ops.triton.sparse_mlp as kernels

empty = torch.empty


def poisoned(*shape, **options):
    tensor = empty(*shape, **options)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**20)


torch.empty = poisoned
kernels.multiprocessors = lambda device: 2
kernels.dependent_launch = lambda device: {"PDL": False}
torch.cuda.device = lambda device: contextlib.nullcontext()

count = 0
for tokens, hidden, neurons, options in [
    (1, 1, 1, {}),
    (1, 63, 65, {}),
    (1, 1100, 33, {"bias": True, "activation": "gelu"}),
    (1, 64, 40, {"sparsity": 0.9, "activation": "gelu_tanh"}),
    (1, 64, 40, {"sparsity": 1.0, "activation": "relu"}),
    (2, 63, 65, {"bias": True}),
    (3, 1, 7, {}),
    (5, 300, 33, {"activation": "gelu_tanh"}),
    (8, 130, 40, {"sparsity": 0.9}),
]:
    for dtype in (torch.float32, torch.float16):
        args = arguments(tokens, hidden, neurons, dtype, "cpu", **options)
        assert_close(kernels.launch(*args), expected(args), dtype)
        count += 1
    for bad in (float("nan"), float("inf")):
        args[0][0, 0] = bad
        assert_close(kernels.launch(*args), expected(args), dtype)
        count += 1
args = arguments(2, 63, 65, torch.float32, "cpu", bias=True)
for rows in (1, 2):
    args[0] = args[0][:rows]
    strided = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in args]
    assert_close(kernels.launch(*strided), expected(args), torch.float32)
    count += 1
print(f"{count} cases equal the reference")
