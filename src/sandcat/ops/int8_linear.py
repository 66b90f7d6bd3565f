"""A linear layer whose weight is stored as int8, with one scale an output. The op `sandcat::int8_linear`.

Shapes: T tokens, I input channels, O outputs. The weight is output-major, as usual: output o is
`scale_O[o] * (weight_OI[o] . x)`. Activations stay as they are; products are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.checks import check_tensors
from sandcat.ops.gradients import differentiable
from sandcat.ops.weights import product


def reference(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The definition: y = (x weight^T) * scale + bias. Returns float32 [T, O], as the kernels accumulate it."""
    return product(x_TI, weight_OI, bias_O, scale_O).float()


def check_arguments(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    O, I = weight_OI.shape
    check_tensors(
        "int8_linear", x_TI, {"weight": (weight_OI, scale_O, O)},
        {"x": (x_TI, (len(x_TI), I)), "weight": (weight_OI, (O, I)), "bias": (bias_O, (O,))},
    )  # fmt: skip


int8_linear = torch.library.custom_op("sandcat::int8_linear", reference, mutates_args=())
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@int8_linear.register_fake
def _(x_TI, weight_OI, scale_O, bias_O=None):
    return x_TI.new_empty((x_TI.shape[0], weight_OI.shape[0]), dtype=torch.float32)


differentiable(int8_linear, reference)
