"""CUDA kernels of `sandcat::shared_linear` and `sandcat::shared_up_down`. Shapes: see ops/shared_units.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.shared_units import reference_linear, reference_up_down, shared_linear, shared_up_down
from sandcat.ops.sparse_linear import check_arguments as check_linear
from sandcat.ops.sparse_mlp import check_arguments as check_mlp
from sandcat.ops.triton.sparse_linear_batch import add_channels
from sandcat.ops.triton.sparse_mlp_batch import add_tokens

OPS = INT8_OPS = ("shared_linear", "shared_up_down")


@shared_linear.register_kernel("cuda")
def launch(
    x_BI: Tensor,
    weight_IO: Tensor,
    threshold_I: Tensor,
    bias_O: Tensor | None = None,
    scale_O: Tensor | None = None,
) -> Tensor:
    check_linear(x_BI, weight_IO, threshold_I, bias_O, scale_O)
    if torch.are_deterministic_algorithms_enabled():
        return reference_linear(x_BI, weight_IO, threshold_I, bias_O, scale_O)
    return add_channels(x_BI, weight_IO, threshold_I, bias_O, scale_O, shared=True)


@shared_up_down.register_kernel("cuda")
def launch_up_down(
    x_BH: Tensor,
    a_BI: Tensor,
    up_IH: Tensor,
    down_IH: Tensor,
    threshold_I: Tensor,
    up_bias_I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    up_scale_I: Tensor | None = None,
    down_scale_H: Tensor | None = None,
) -> Tensor:
    check_mlp(
        "shared_up_down", x_BH, None, a_BI, up_IH, down_IH, threshold_I, None, up_bias_I, down_bias_H, None, up_scale_I,
        down_scale_H,
    )  # fmt: skip
    if torch.are_deterministic_algorithms_enabled():
        rest = (up_bias_I, down_bias_H, up_scale_I, down_scale_H)
        return reference_up_down(x_BH, a_BI, up_IH, down_IH, threshold_I, *rest)
    scales = (up_scale_I, down_scale_H)
    y_BH = add_tokens(x_BH, a_BI, up_IH, down_IH, threshold_I, up_bias_I, *scales, shared=True)
    return y_BH if down_bias_H is None else y_BH + down_bias_H
