"""A gated MLP of which each token computes only the neurons that were chosen for it beforehand. The op
`sandcat::core_mlp`.

Shapes: as in ops/sparse_mlp.py; all three matrices are neuron-major, and a neuron that no token has is three skipped
rows: gate, up and down.
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
    core_TI: Tensor,
    activation: str,
    gate_bias_I: Tensor | None = None,
    up_bias_I: Tensor | None = None,
    down_bias_H: Tensor | None = None,
    gate_scale_I: Tensor | None = None,
    up_scale_I: Tensor | None = None,
    down_scale_H: Tensor | None = None,
) -> Tensor:
    """The definition: neuron j of token t is computed iff core_tj (bool).

    Returns float32 [T, H], as the kernels accumulate it; the caller casts.
    """
    a_TI = ACTIVATIONS[activation](product(x_TH, gate_IH, gate_bias_I, gate_scale_I))
    h_TI = torch.where(core_TI, a_TI * product(x_TH, up_IH, up_bias_I, up_scale_I), 0)
    return product(h_TI, down_IH.t(), down_bias_H, down_scale_H).float()


def check_arguments(
    x_TH, gate_IH, up_IH, down_IH, core_TI, gate_bias_I, up_bias_I, down_bias_H, gate_scale_I, up_scale_I, down_scale_H
) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    I, H = gate_IH.shape
    weights = {"gate": (gate_IH, gate_scale_I, I), "up": (up_IH, up_scale_I, I), "down": (down_IH, down_scale_H, H)}
    shapes = {
        "x": (x_TH, (len(x_TH), H)), "gate": (gate_IH, (I, H)), "up": (up_IH, (I, H)), "down": (down_IH, (I, H)),
        "gate_bias": (gate_bias_I, (I,)), "up_bias": (up_bias_I, (I,)), "down_bias": (down_bias_H, (H,)),
    }  # fmt: skip
    check_tensors("core_mlp", x_TH, weights, shapes)
    if core_TI.shape != (len(x_TH), I) or core_TI.dtype != torch.bool:
        raise ValueError(
            f"sandcat::core_mlp: core is {tuple(core_TI.shape)} {core_TI.dtype}; for {len(x_TH)} tokens and {I} "
            f"neurons it must be {(len(x_TH), I)} torch.bool."
        )


core_mlp = torch.library.custom_op("sandcat::core_mlp", reference, mutates_args=())
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@core_mlp.register_fake
def _(
    x_TH, gate_IH, up_IH, down_IH, core_TI, activation, gate_bias_I=None, up_bias_I=None, down_bias_H=None,
    gate_scale_I=None, up_scale_I=None, down_scale_H=None,
):  # fmt: skip
    return x_TH.new_empty((x_TH.shape[0], down_IH.shape[1]), dtype=torch.float32)


differentiable(core_mlp, reference)
