"""Which library has an op's kernel for a device: registered here, so that a report can say it and a missing kernel
cannot hide."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sandcat.ops.core_mlp import core_mlp
from sandcat.ops.op import Op
from sandcat.ops.paged_attention import paged_attention
from sandcat.ops.shared_units import shared_linear, shared_up_down
from sandcat.ops.sparse_linear import sparse_linear
from sandcat.ops.sparse_mlp import sparse_mlp, sparse_up_down
from sandcat.ops.sparse_up import sparse_up
from sandcat.ops.stored_linear import stored_linear

OPS: dict[str, tuple[Op, str]] = {
    "core_mlp": (core_mlp, "core_mlp"),
    "paged_attention": (paged_attention, "paged_attention"),
    "shared_linear": (shared_linear, "shared_units"),
    "shared_up_down": (shared_up_down, "shared_units"),
    "sparse_linear": (sparse_linear, "sparse_linear"),
    "sparse_mlp": (sparse_mlp, "sparse_mlp"),
    "sparse_up": (sparse_up, "sparse_up"),
    "sparse_up_down": (sparse_up_down, "sparse_mlp"),
    "stored_linear": (stored_linear, "stored_linear"),
}
"""By its name each op, and the file that has its kernel, in the folder of each library that has one."""

_KERNELS: dict[tuple[str, str], str] = {}
"""(op, device) -> the library that has the kernel."""


def _register_numba() -> None:
    """Has each CPU kernel imported when it is first called: Numba takes a while to import, and vLLM stumbles over it
    where it comes early."""
    if importlib.util.find_spec("numba") is None:
        return
    for name, (op, file) in OPS.items():
        _KERNELS[name, "cpu"] = "numba"
        op.register_kernel("cpu")(_importing(op, f"sandcat.ops.numba.{file}"))


def _importing(op: Op, module: str) -> Callable[..., Tensor]:
    def kernel(*args) -> Tensor:
        importlib.import_module(module)  # registers the kernel in place of this one
        return op(*args)

    return kernel


def _register_triton() -> None:
    """Imports the CUDA kernels, where Triton is installed and has them; else the references run."""
    if importlib.util.find_spec("triton") is None:
        return
    for file in dict.fromkeys(file for _, file in OPS.values()):
        name = f"sandcat.ops.triton.{file}"
        if importlib.util.find_spec(name) is None:  # and only then: a kernel that cannot be imported is an error
            continue
        _KERNELS.update({(op, "cuda"): "triton" for op in importlib.import_module(name).OPS})


_register_numba()
if torch.cuda.is_available():
    _register_triton()


def kernel_name(op: str, device: torch.device | str, format: str = "float") -> str:
    """Which implementation runs an op on this device: "numba", "triton" or "reference".

    Args:
        format: of the matrix, a name of `FORMATS`.
    """
    kind = torch.device(device).type
    return _KERNELS.get((op, kind), "reference") if OPS[op][0].reads(kind, format) else "reference"
