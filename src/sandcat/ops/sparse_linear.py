"""A linear layer that skips, for each token, the input channels whose value is small. The op `sandcat::sparse_linear`.

Shapes: T tokens, I input channels, O outputs. The weight is [O, I], as usual, and kernels want it to lie by channels,
as a transposed view of [I, O], so that a skipped channel is a skipped row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.checks import check_tensors
from sandcat.ops.op import Op
from sandcat.ops.weights import Stored, product


def reference(x_TI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    """The definition: channel i of a token is dropped iff |x_i| <= threshold_i.

    Returns float32 [T, O], as the kernels accumulate it; the caller casts. A NaN is not dropped: it comes out, as it
    would of the dense layer.
    """
    return product(torch.where(x_TI.abs() <= threshold_I, 0, x_TI), weight).float()


def check_arguments(x_TI: Tensor, weight: Stored, threshold_I: Tensor) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    O, I = weight.codes.shape
    shapes = {"x": (x_TI, (len(x_TI), I)), "threshold": (threshold_I, (I,))}
    check_tensors("sparse_linear", x_TI, {"weight": (weight, (O, I))}, shapes)


sparse_linear = Op("sparse_linear", reference)
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_linear.register_fake
def _(x_TI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], weight.codes.shape[0]), dtype=torch.float32)
