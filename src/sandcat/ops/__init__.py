"""The maths: each op is defined by its torch reference; kernels for a device are added where it has them.

`kernel_name` says what runs an op on a device, so that a report can say it and a missing kernel cannot hide.
"""

from __future__ import annotations

import importlib

import torch

from sandcat.ops.arguments import MAX_TOKENS, PROMPT_CHUNK
from sandcat.ops.sparse_linear import sparse_linear
from sandcat.ops.sparse_mlp import sparse_mlp

__all__ = ["MAX_TOKENS", "OPS", "PROMPT_CHUNK", "kernel_name", "most_tokens", "sparse_linear", "sparse_mlp"]

OPS = ("sparse_linear", "sparse_mlp")
_KERNELS: dict[tuple[str, str], str] = {}


def _register(device: str, library: str) -> None:
    """Imports the kernels of a library, one module an op; where it is not installed, the references run."""
    for op in OPS:
        try:
            importlib.import_module(f"sandcat.ops.{library}.{op}")
            _KERNELS[op, device] = library
        except ImportError:
            pass


_register("cpu", "numba")
if torch.cuda.is_available():
    _register("cuda", "triton")


_MOST_TOKENS = {
    ("sparse_mlp", "cpu", torch.bfloat16): 2,
    ("sparse_mlp", "cpu", torch.float16): 2,
    ("sparse_mlp", "cuda", torch.float32): 1,
    ("sparse_mlp", "cuda", torch.bfloat16): 1,
    ("sparse_mlp", "cuda", torch.float16): 1,
    ("sparse_linear", "cpu", torch.float32): 1,
    ("sparse_linear", "cpu", torch.bfloat16): 1,
    ("sparse_linear", "cpu", torch.float16): 1,
    ("sparse_linear", "cuda", torch.float32): 1,
    ("sparse_linear", "cuda", torch.bfloat16): 1,
    ("sparse_linear", "cuda", torch.float16): 1,
}
"""Tokens at once up to which a kernel beats dense matrix products on its device, where that is fewer than it can take.
Measured: docs/performance.md."""


def kernel_name(op: str, device: torch.device | str) -> str:
    """Which implementation runs an op on this device: "numba", "triton" or "reference"."""
    return _KERNELS.get((op, torch.device(device).type), "reference")


def most_tokens(op: str, device: torch.device | str, dtype: torch.dtype) -> int:
    """Tokens at once up to which skipping pays here; more run as dense products with the mask applied."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    return _MOST_TOKENS.get((op, torch.device(device).type, dtype), MAX_TOKENS)
