"""CUDA kernel of `sandcat::int8_linear` for one token: rows that are read once, in turn, by programs that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.int8_linear import check_arguments, int8_linear, reference
from sandcat.ops.triton.launch import multiprocessors
from sandcat.ops.triton.step import project, whole_rows_config

OPS, INT8_OPS = (), ("int8_linear",)


@int8_linear.register_kernel("cuda")
def launch(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    check_arguments(x_TI, weight_OI, scale_O, bias_O)
    if len(x_TI) > 1:
        return reference(x_TI, weight_OI, scale_O, bias_O)
    x, weight, scale = x_TI.contiguous(), weight_OI.contiguous(), scale_O.contiguous()
    bias = None if bias_O is None else bias_O.contiguous()
    O, I = weight.shape
    y_TO = torch.empty(1, O, dtype=torch.float32, device=x.device)
    config = whole_rows_config(I, weight.element_size())
    grid = (multiprocessors(x.device) * config.pop("per_multiprocessor"),)
    with torch.cuda.device(x.device):  # not a dependent launch: it would ask for weights that may not be written yet
        project[grid](
            x, None, 0.0, *[weight] * 3, *[bias] * 3, *[scale] * 3, y_TO, None, O, 0, 0, I, PDL=False, **config
        )  # fmt: skip
    return y_TO
