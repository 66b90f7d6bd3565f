"""The up projection of a gated MLP for the neurons that a token keeps, where an engine has the down projection in a
layer of its own. The op `sandcat::sparse_up`.

Shapes: as in ops/sparse_mlp.py. A dropped neuron's row of up is not read, and its output is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.checks import check_tensors
from sandcat.ops.op import Op
from sandcat.ops.weights import Stored, product


def reference(x_TH: Tensor, a_TI: Tensor, up: Stored, threshold_I: Tensor) -> Tensor:
    """The definition: neuron j of a token is dropped iff |a_j| <= threshold_j. In x's dtype, [T, I]."""
    return torch.where(a_TI.abs() <= threshold_I, 0, product(x_TH, up))


def check_arguments(x_TH: Tensor, a_TI: Tensor, up: Stored, threshold_I: Tensor) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    I, H = up.codes.shape
    shapes = {"x": (x_TH, (len(x_TH), H)), "a": (a_TI, (len(x_TH), I)), "threshold": (threshold_I, (I,))}
    check_tensors("sparse_up", x_TH, {"up": (up, (I, H))}, shapes)


sparse_up = Op("sparse_up", reference, gradients=False)
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_up.register_fake
def _(x_TH: Tensor, a_TI: Tensor, up: Stored, threshold_I: Tensor) -> Tensor:
    return torch.empty_like(a_TI)
