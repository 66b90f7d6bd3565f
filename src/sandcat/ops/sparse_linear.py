"""A linear layer that skips, for each token, the input channels whose value is small. The op `sandcat::sparse_linear`.

Shapes: T tokens, I input channels, O outputs. The weight is channel-major, one row a channel, so that a skipped channel
is a skipped row: `weight_IO[i]` is column i of the usual weight. With `scale_O` the weight is int8 (see
int8_linear.py): a scale belongs to an output, so it is applied once, at the end, whatever was skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.checks import check_tensors
from sandcat.ops.gradients import differentiable
from sandcat.ops.weights import product


def reference(
    x_TI: Tensor,
    weight_IO: Tensor,
    threshold_I: Tensor,
    bias_O: Tensor | None = None,
    scale_O: Tensor | None = None,
) -> Tensor:
    """The definition: channel i of a token is dropped iff |x_i| <= threshold_i.

    Returns float32 [T, O], as the kernels accumulate it; the caller casts. A NaN is not dropped: it comes out, as it
    would of the dense layer.
    """
    x_TI = torch.where(x_TI.abs() <= threshold_I, 0, x_TI)
    return product(x_TI, weight_IO.t(), bias_O, scale_O).float()


def check_arguments(
    x_TI: Tensor, weight_IO: Tensor, threshold_I: Tensor, bias_O: Tensor | None, scale_O: Tensor | None
) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    I, O = weight_IO.shape
    shapes = {
        "x": (x_TI, (len(x_TI), I)), "weight": (weight_IO, (I, O)), "threshold": (threshold_I, (I,)),
        "bias": (bias_O, (O,)),
    }  # fmt: skip
    check_tensors("sparse_linear", x_TI, {"weight": (weight_IO, scale_O, O)}, shapes)


sparse_linear = torch.library.custom_op("sandcat::sparse_linear", reference, mutates_args=())
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_linear.register_fake
def _(x_TI, weight_IO, threshold_I, bias_O=None, scale_O=None):
    return x_TI.new_empty((x_TI.shape[0], weight_IO.shape[1]), dtype=torch.float32)


differentiable(sparse_linear, reference)
