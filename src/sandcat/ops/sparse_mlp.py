"""A gated MLP that skips, for each token, the neurons whose gate is small. The op `sandcat::sparse_mlp`; and
`sandcat::sparse_up_down`, the same for a gate that was computed elsewhere.

Shapes: T tokens, H hidden size, I intermediate size (neurons). gate and up are [I, H], down is [H, I], as usual;
kernels want down to lie by neurons, as a transposed view of [I, H], so that a skipped neuron is a skipped row of all
three. Each may be stored in a format of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.checks import check_tensors
from sandcat.ops.op import Op
from sandcat.ops.weights import Stored, product


def reference(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    """The definition: neuron j of a token is dropped iff |a_j| <= threshold_j, with a = activation(gate(x)).

    Returns float32 [T, H], as the kernels accumulate it; the caller casts, so that a compiler can fuse the cast with
    what follows. A NaN in `a` is not dropped: it comes out, as it would from the dense MLP.
    """
    return reference_up_down(x_TH, ACTIVATIONS[activation](product(x_TH, gate)), up, down, threshold_I)


def reference_up_down(x_TH: Tensor, a_TI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    """The definition of the second half: as `reference`, with a = a_TI."""
    return product(torch.where(a_TI.abs() <= threshold_I, 0, a_TI * product(x_TH, up)), down).float()


def check_arguments(
    op: str, x_TH: Tensor, gate: Stored | None, a_TI: Tensor | None, up: Stored, down: Stored, threshold_I: Tensor
) -> None:
    """What a kernel reads by address must be there; one of gate and a is None.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    I, H = (up if gate is None else gate).codes.shape
    weights = {"gate": (gate, (I, H)), "up": (up, (I, H)), "down": (down, (H, I))}
    shapes = {"x": (x_TH, (len(x_TH), H)), "a": (a_TI, (len(x_TH), I)), "threshold": (threshold_I, (I,))}
    check_tensors(op, x_TH, weights, shapes)


sparse_mlp = Op("sparse_mlp", reference)
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_mlp.register_fake
def _(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    return x_TH.new_empty((x_TH.shape[0], down.codes.shape[0]), dtype=torch.float32)


sparse_up_down = Op("sparse_up_down", reference_up_down)
"""`reference_up_down` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@sparse_up_down.register_fake
def _(x_TH: Tensor, a_TI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    return x_TH.new_empty((x_TH.shape[0], down.codes.shape[0]), dtype=torch.float32)
