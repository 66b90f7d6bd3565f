"""Where a kernel is the fastest way of its layer, and how weights lie for it."""

from __future__ import annotations

import torch

from sandcat.ops.checks import LARGE
from sandcat.ops.registry import OPS, kernel_name
from sandcat.ops.weights import CODED

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MLP = ("sparse_mlp", "sparse_up_down", "sparse_up")
_ALL = tuple(OPS)
_CUDA_CODED = ("sparse_mlp", "sparse_up_down", "sparse_linear", "stored_linear", "shared_linear", "shared_up_down")
_MOST_TOKENS = {
    **{(op, "cpu", torch.float32, "float"): (1, 8) for op in _MLP},
    **{("sparse_linear", "cpu", dtype, "float"): (1, 2) for dtype in _FLOATS},
    ("core_mlp", "cpu", torch.float32, "float"): (8, 8),
    **{("core_mlp", "cpu", dtype, "float"): (2, 2) for dtype in _FLOATS[1:]},
    **{(op, "cpu", torch.float32, "float"): (1, 16) for op in ("shared_linear", "shared_up_down")},
    **{(op, "cpu", dtype, "float"): (1, 4) for op in ("shared_linear", "shared_up_down") for dtype in _FLOATS[1:]},
    **{(op, "cpu", dtype, format): (16, 16) for op in _ALL for dtype in _FLOATS for format in CODED},
    **{("shared_linear", "cuda", dtype, "float"): (1, 8) for dtype in _FLOATS[1:]},
    **{("shared_up_down", "cuda", dtype, "float"): (1, 16) for dtype in _FLOATS[1:]},
    **{(op, "cuda", dtype, format): (16, 16) for op in _CUDA_CODED for dtype in _FLOATS[1:] for format in CODED},
    **{("stored_linear", "cuda", torch.float32, format): (16, 16) for format in CODED},
}
"""Tokens at once up to which a kernel is the fastest way of its layer, by op, device, dtype and the format of the
weights, for matrices of fewer than `LARGE` numbers and for larger ones; 1 where nothing is said. Measured by
benchmarks/batch.py (docs/performance.md) for numbers and int8; float16 is taken for bfloat16, other formats for int8,
unmeasured, as their dense products have to widen codes too, and small matrices on a GPU for ones that do not pay."""


def most_tokens(op: str, device: torch.device | str, dtype: torch.dtype, size: int, format: str = "float") -> int:
    """Tokens at once up to which the kernel pays here; more run as dense products.

    Args:
        dtype: of the activations.
        size: numbers in a weight matrix.
        format: of the weights, a name of `FORMATS`.
    """
    if dtype not in _FLOATS or (format != "float" and kernel_name(op, device, format) == "reference"):
        return 0
    return _MOST_TOKENS.get((op, torch.device(device).type, dtype, format), (1, 1))[size >= LARGE]


def skips_rows(device: torch.device | str, row_bytes: int) -> bool:
    """Whether a weight whose inputs can be skipped is stored by inputs there; else as a dense layer's, and masked.

    One token decides it, for which a weight is stored once: products of several read it as it lies.
    """
    if torch.device(device).type != "cpu" or kernel_name("sparse_linear", "cpu") != "numba":
        return True
    from sandcat.ops.numba.primitives import processor  # here, as Numba takes a while to import

    return row_bytes >= processor.SHORT_ROW
