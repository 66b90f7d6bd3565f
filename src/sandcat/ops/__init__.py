"""The maths: each op is defined by its torch reference; kernels for a device are added where it has them.

`kernel_name` says what runs an op on a device, so that a report can say it and a missing kernel cannot hide.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sandcat.ops.arguments import LARGE, MAX_TOKENS, PROMPT_CHUNK
from sandcat.ops.core_mlp import core_mlp
from sandcat.ops.int8_linear import int8_linear
from sandcat.ops.masks import drop_up, mask
from sandcat.ops.shared import shared_linear, shared_up_down
from sandcat.ops.sparse_linear import sparse_linear
from sandcat.ops.sparse_mlp import sparse_mlp, sparse_up_down
from sandcat.ops.sparse_up import sparse_up

__all__ = [
    "MAX_TOKENS", "PROMPT_CHUNK", "core_mlp", "drop_up", "int8_linear", "kernel_name", "mask", "most_tokens",
    "shared_linear", "shared_up_down", "sparse_linear", "sparse_mlp", "sparse_up", "sparse_up_down",
]  # fmt: skip

_KERNELS: dict[tuple[str, str, bool], str] = {}
"""(op, device, whether the weights are int8) -> the library that has the kernel."""


_FILES = {
    "core_mlp": "core_mlp", "int8_linear": "int8_linear", "shared_linear": "shared", "shared_up_down": "shared",
    "sparse_linear": "sparse_linear", "sparse_mlp": "sparse_mlp", "sparse_up": "sparse_up",
    "sparse_up_down": "sparse_mlp",
}  # fmt: skip
"""The file that has an op's kernel, in the folder of each library that has one."""


def _register_numba() -> None:
    """Has each CPU kernel imported when it is first called: Numba takes a while to import, and vLLM stumbles over it
    where it comes early."""
    if importlib.util.find_spec("numba") is None:
        return
    for name, file in _FILES.items():
        op = globals()[name]
        _KERNELS.update({(name, "cpu", int8): "numba" for int8 in ({True} if op is int8_linear else {True, False})})
        op.register_kernel("cpu")(_importing(op, f"sandcat.ops.numba.{file}"))


def _importing(op: torch.library.CustomOpDef, module: str) -> Callable[..., Tensor]:
    def kernel(*args) -> Tensor:
        importlib.import_module(module)  # registers the kernel in place of this one
        return op(*args)

    return kernel


def _register_triton() -> None:
    """Imports the CUDA kernels, where Triton is installed and has them; else the references run."""
    for file in dict.fromkeys(_FILES.values()):
        try:
            kernels = importlib.import_module(f"sandcat.ops.triton.{file}")
        except ImportError:
            continue
        _KERNELS.update({(op, "cuda", False): "triton" for op in kernels.OPS})
        _KERNELS.update({(op, "cuda", True): "triton" for op in kernels.INT8_OPS})


_register_numba()
if torch.cuda.is_available():
    _register_triton()


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MLP = ("sparse_mlp", "sparse_up_down", "sparse_up")
_ALL = (*_MLP, "core_mlp", "sparse_linear", "int8_linear", "shared_linear", "shared_up_down")
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


def kernel_name(op: str, device: torch.device | str, int8: bool = False) -> str:
    """Which implementation runs an op on this device: "numba", "triton" or "reference"."""
    return _KERNELS.get((op, torch.device(device).type, int8), "reference")


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
