"""The maths: each op is defined by its torch reference; kernels for a device are added where it has them.

`kernel_name` says what runs an op on a device, so that a report can say it and a missing kernel cannot hide.
"""

from __future__ import annotations

import importlib

import torch

from sandcat.ops.arguments import MAX_TOKENS, PROMPT_CHUNK
from sandcat.ops.sparse_linear import sparse_linear
from sandcat.ops.sparse_mlp import sparse_mlp, sparse_up_down

__all__ = [
    "MAX_TOKENS", "PROMPT_CHUNK", "kernel_name", "most_tokens", "sparse_linear", "sparse_mlp", "sparse_up_down",
]  # fmt: skip

_KERNELS: dict[tuple[str, str], str] = {}


def _register(device: str, library: str) -> None:
    """Imports the kernels of a library, where it is installed and has them; else the references run."""
    for name in ("sparse_linear", "sparse_mlp"):
        try:
            kernels = importlib.import_module(f"sandcat.ops.{library}.{name}")
        except ImportError:
            continue
        for op in kernels.OPS:
            _KERNELS[op, device] = library


_register("cpu", "numba")
if torch.cuda.is_available():
    _register("cuda", "triton")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_TOKENS = {
    **{(op, "cpu", dtype): 2 for op in ("sparse_mlp", "sparse_up_down") for dtype in _FLOATS[1:]},
    **{("sparse_linear", "cpu", dtype): 1 for dtype in _FLOATS},
    **{(op, "cuda", dtype): 1 for op in ("sparse_linear", "sparse_mlp", "sparse_up_down") for dtype in _FLOATS},
}
"""Tokens at once up to which a kernel beats dense matrix products on its device, where that is fewer than it can take.
Measured: docs/performance.md."""


def kernel_name(op: str, device: torch.device | str) -> str:
    """Which implementation runs an op on this device: "numba", "triton" or "reference"."""
    return _KERNELS.get((op, torch.device(device).type), "reference")


def most_tokens(op: str, device: torch.device | str, dtype: torch.dtype) -> int:
    """Tokens at once up to which skipping pays here; more run as dense products with the mask applied."""
    if dtype not in _FLOATS:
        return 0
    return _MOST_TOKENS.get((op, torch.device(device).type, dtype), MAX_TOKENS)
