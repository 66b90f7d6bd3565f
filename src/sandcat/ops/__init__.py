"""The maths: each op is defined by its torch reference; kernels for a device are added where it has them.

`kernel_name` says what runs on a device, so that a report can say it and a missing kernel cannot hide.
"""

from __future__ import annotations

import torch

from sandcat.ops.sparse_mlp import MAX_TOKENS, sparse_mlp

__all__ = ["kernel_name", "most_tokens", "sparse_mlp"]

_KERNELS = {"cpu": "reference", "cuda": "reference"}

try:
    import sandcat.ops.numba.sparse_mlp

    _KERNELS["cpu"] = "numba"
except ImportError:  # numba has no wheel for this Python or machine: the reference runs, and reports say so
    pass
if torch.cuda.is_available():
    try:
        import sandcat.ops.triton.sparse_mlp  # noqa: F401

        _KERNELS["cuda"] = "triton"
    except ImportError:  # no Triton for this system
        pass


_MOST_TOKENS = {
    ("cpu", torch.bfloat16): 2,
    ("cpu", torch.float16): 2,
    ("cuda", torch.float32): 1,
    ("cuda", torch.bfloat16): 1,
    ("cuda", torch.float16): 1,
}
"""Tokens at once up to which a kernel beats dense matrix products on its device, where that is fewer than it can take.
Measured: docs/performance.md."""


def kernel_name(device: torch.device | str) -> str:
    """Which implementation runs the ops on this device: "numba", "triton" or "reference"."""
    return _KERNELS.get(torch.device(device).type, "reference")


def most_tokens(device: torch.device | str, dtype: torch.dtype) -> int:
    """Tokens at once up to which skipping pays here; more run as dense products with the mask applied."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    return _MOST_TOKENS.get((torch.device(device).type, dtype), MAX_TOKENS)
