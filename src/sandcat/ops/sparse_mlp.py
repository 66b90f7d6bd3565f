"""A gated MLP that skips, for each token, the neurons whose gate is small. The op `sandcat::sparse_mlp`; and
`sandcat::sparse_up_down`, the same for a gate that was computed elsewhere.

Shapes: T tokens, H hidden size, I intermediate size (neurons). All three matrices are neuron-major, one row a neuron,
so that a skipped neuron is a skipped row: `gate_IH[j]`, `up_IH[j]` and `down_IH[j]` (column j of the usual down
projection). A matrix with a scale is int8 (see int8_linear.py): `gate_scale_I` and `up_scale_I` one a neuron,
`down_scale_H` one an output, which is applied once, at the end, whatever was skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.checks import check_tensors
from sandcat.ops.gradients import differentiable
from sandcat.ops.weights import product


def reference(
    x_TH: Tensor,
    gate_IH: Tensor,
    up_IH: Tensor,
    down_IH: Tensor,
    threshold_I: Tensor,
    activation: str,
    gate_bias_I: Tensor | None = None,
    up_bias_I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    gate_scale_I: Tensor | None = None,
    up_scale_I: Tensor | None = None,
    down_scale_H: Tensor | None = None,
) -> Tensor:
    """The definition: neuron j of a token is dropped iff |a_j| <= threshold_j, with a = activation(gate(x)).

    Returns float32 [T, H], as the kernels accumulate it; the caller casts, so that a compiler can fuse the cast with
    what follows. A NaN in `a` is not dropped: it comes out, as it would from the dense MLP.
    """
    a_TI = ACTIVATIONS[activation](product(x_TH, gate_IH, gate_bias_I, gate_scale_I))
    rest = (up_bias_I, down_bias_H, up_scale_I, down_scale_H)
    return reference_up_down(x_TH, a_TI, up_IH, down_IH, threshold_I, *rest)


def reference_up_down(
    x_TH: Tensor,
    a_TI: Tensor,
    up_IH: Tensor,
    down_IH: Tensor,
    threshold_I: Tensor,
    up_bias_I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    up_scale_I: Tensor | None = None,
    down_scale_H: Tensor | None = None,
) -> Tensor:
    """The definition of the second half: as `reference`, with a = a_TI."""
    h_TI = torch.where(a_TI.abs() <= threshold_I, 0, a_TI * product(x_TH, up_IH, up_bias_I, up_scale_I))
    return product(h_TI, down_IH.t(), down_bias_H, down_scale_H).float()


def check_arguments(
    op: str, x_TH, gate_IH, a_TI, up_IH, down_IH, threshold_I,
    gate_bias_I, up_bias_I, down_bias_H, gate_scale_I, up_scale_I, down_scale_H,
) -> None:  # fmt: skip
    """What a kernel reads by address must be there; one of gate and a is None.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    I, H = (up_IH if gate_IH is None else gate_IH).shape
    weights = {"gate": (gate_IH, gate_scale_I, I), "up": (up_IH, up_scale_I, I), "down": (down_IH, down_scale_H, H)}
    shapes = {
        "x": (x_TH, (len(x_TH), H)), "a": (a_TI, (len(x_TH), I)), "gate": (gate_IH, (I, H)), "up": (up_IH, (I, H)),
        "down": (down_IH, (I, H)), "threshold": (threshold_I, (I,)), "gate_bias": (gate_bias_I, (I,)),
        "up_bias": (up_bias_I, (I,)), "down_bias": (down_bias_H, (H,)),
    }  # fmt: skip
    check_tensors(op, x_TH, weights, shapes)


sparse_mlp = torch.library.custom_op("sandcat::sparse_mlp", reference, mutates_args=())
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_mlp.register_fake
def _(
    x_TH, gate_IH, up_IH, down_IH, threshold_I, activation, gate_bias_I=None, up_bias_I=None, down_bias_H=None,
    gate_scale_I=None, up_scale_I=None, down_scale_H=None,
):  # fmt: skip
    return x_TH.new_empty((x_TH.shape[0], down_IH.shape[1]), dtype=torch.float32)


sparse_up_down = torch.library.custom_op("sandcat::sparse_up_down", reference_up_down, mutates_args=())
"""`reference_up_down` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_up_down.register_fake
def _(x_TH, a_TI, up_IH, down_IH, threshold_I, up_bias_I=None, down_bias_H=None, up_scale_I=None, down_scale_H=None):
    return x_TH.new_empty((x_TH.shape[0], down_IH.shape[1]), dtype=torch.float32)


differentiable(sparse_mlp, reference)
differentiable(sparse_up_down, reference_up_down)
