"""A linear layer whose weight is stored as codes. The op `sandcat::stored_linear`.

Shapes: T tokens, I input channels, O outputs. Activations stay as they are; products are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.checks import check_tensors
from sandcat.ops.op import Op
from sandcat.ops.weights import Stored, product


def reference(x_TI: Tensor, weight: Stored) -> Tensor:
    """The definition: y = (x codes^T) * scale + bias. Returns float32 [T, O], as the kernels accumulate it."""
    return product(x_TI, weight).float()


def check_arguments(x_TI: Tensor, weight: Stored) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    O, I = weight.codes.shape
    check_tensors("stored_linear", x_TI, {"weight": (weight, (O, I))}, {"x": (x_TI, (len(x_TI), I))})


stored_linear = Op("stored_linear", reference, floats=False)
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@stored_linear.register_fake
def _(x_TI: Tensor, weight: Stored) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], weight.codes.shape[0]), dtype=torch.float32)
