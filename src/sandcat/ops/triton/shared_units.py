"""CUDA kernels of `sandcat::shared_linear` and `sandcat::shared_up_down`. Shapes: see ops/shared_units.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.shared_units import reference_linear, reference_up_down, shared_linear, shared_up_down
from sandcat.ops.sparse_linear import check_arguments as check_linear
from sandcat.ops.sparse_mlp import check_arguments as check_mlp
from sandcat.ops.triton.sparse_linear_batch import add_channels
from sandcat.ops.triton.sparse_mlp_batch import add_tokens
from sandcat.ops.weights import Stored

OPS = ("shared_linear", "shared_up_down")


@shared_linear.register_kernel("cuda")
def launch(x_BI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    """The op on a GPU; see ops/shared_units.py."""
    check_linear(x_BI, weight, threshold_I)
    if torch.are_deterministic_algorithms_enabled():
        return reference_linear(x_BI, weight, threshold_I)
    return add_channels(x_BI, weight, threshold_I, shared=True)


@shared_up_down.register_kernel("cuda")
def launch_up_down(x_BH: Tensor, a_BI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    """The op on a GPU; see ops/shared_units.py."""
    check_mlp("shared_up_down", x_BH, None, a_BI, up, down, threshold_I)
    if torch.are_deterministic_algorithms_enabled():
        return reference_up_down(x_BH, a_BI, up, down, threshold_I)
    y_BH = add_tokens(x_BH, a_BI, up, down, threshold_I, shared=True)
    return y_BH if down.bias is None else y_BH + down.bias
