"""The maths: each op is defined by its torch reference; kernels for a device are added where it has them.

`kernel(op, device)` names what runs, so that a report can say it and a missing kernel cannot hide.
"""

from __future__ import annotations

import torch

from sandcat.ops.sparse_mlp import sparse_mlp

__all__ = ["kernel_name", "sparse_mlp"]

_KERNELS = {"cpu": "reference", "cuda": "reference"}

try:
    import sandcat.ops.numba.sparse_mlp

    _KERNELS["cpu"] = "numba"
except ImportError:  # numba has no wheel for this Python or machine: the reference runs, and reports say so
    pass
if torch.cuda.is_available():
    import sandcat.ops.triton.sparse_mlp  # noqa: F401

    _KERNELS["cuda"] = "triton"


def kernel_name(device: torch.device | str) -> str:
    """Which implementation runs the ops on this device: "numba", "triton" or "reference"."""
    return _KERNELS.get(torch.device(device).type, "reference")
