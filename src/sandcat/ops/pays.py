"""Up to how many tokens at once a kernel is the fastest way of its layer."""

from __future__ import annotations

import torch

from sandcat.ops.checks import LARGE
from sandcat.ops.registry import OPS, kernel_name

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MLP = ("sparse_mlp", "sparse_up_down", "sparse_up")
_ALL = tuple(OPS)
_CUDA_INT8 = ("sparse_mlp", "sparse_up_down", "sparse_linear", "int8_linear", "shared_linear", "shared_up_down")
_MOST_TOKENS = {
    **{(op, "cpu", torch.float32, False): (1, 8) for op in _MLP},
    **{("sparse_linear", "cpu", dtype, False): (1, 2) for dtype in _FLOATS},
    ("core_mlp", "cpu", torch.float32, False): (8, 8),
    **{("core_mlp", "cpu", dtype, False): (2, 2) for dtype in _FLOATS[1:]},
    **{(op, "cpu", torch.float32, False): (1, 16) for op in ("shared_linear", "shared_up_down")},
    **{(op, "cpu", dtype, False): (1, 4) for op in ("shared_linear", "shared_up_down") for dtype in _FLOATS[1:]},
    **{(op, "cpu", dtype, True): (16, 16) for op in _ALL for dtype in _FLOATS},
    **{("shared_linear", "cuda", dtype, False): (1, 8) for dtype in _FLOATS[1:]},
    **{("shared_up_down", "cuda", dtype, False): (1, 16) for dtype in _FLOATS[1:]},
    **{(op, "cuda", dtype, True): (16, 16) for op in _CUDA_INT8 for dtype in _FLOATS[1:]},
    ("int8_linear", "cuda", torch.float32, True): (16, 16),
}
"""Tokens at once up to which a kernel is the fastest way of its layer, by op, device, dtype and whether weights are
int8, for matrices of fewer than `LARGE` numbers and for larger ones; 1 where nothing is said. Measured by
benchmarks/batch.py (docs/performance.md); float16 is taken for bfloat16, unmeasured, and small matrices on a GPU for
ones that do not pay."""


def most_tokens(op: str, device: torch.device | str, dtype: torch.dtype, size: int, int8: bool = False) -> int:
    """Tokens at once up to which the kernel pays here; more run as dense products.

    Args:
        dtype: of the activations.
        size: numbers in a weight matrix.
        int8: whether the weights are int8.
    """
    if dtype not in _FLOATS or (int8 and kernel_name(op, device, int8) == "reference"):
        return 0
    return _MOST_TOKENS.get((op, torch.device(device).type, dtype, int8), (1, 1))[size >= LARGE]
