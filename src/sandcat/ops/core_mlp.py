"""A gated MLP of which each token computes only the neurons that were chosen for it beforehand. The op
`sandcat::core_mlp`.

Shapes: as in ops/sparse_mlp.py; a neuron that no token has is three skipped rows: gate, up and down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.checks import check_tensors
from sandcat.ops.op import Op
from sandcat.ops.weights import Stored, product


def reference(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, core_TI: Tensor, activation: str) -> Tensor:
    """The definition: neuron j of token t is computed iff core_tj (bool).

    Returns float32 [T, H], as the kernels accumulate it; the caller casts.
    """
    a_TI = ACTIVATIONS[activation](product(x_TH, gate))
    return product(torch.where(core_TI, a_TI * product(x_TH, up), 0), down).float()


def check_arguments(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, core_TI: Tensor) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: more than `MAX_TOKENS` tokens, or shapes, dtypes or devices that do not go together.
    """
    I, H = gate.codes.shape
    weights: dict[str, tuple[Stored | None, tuple]] = {
        "gate": (gate, (I, H)),
        "up": (up, (I, H)),
        "down": (down, (H, I)),
    }
    check_tensors("core_mlp", x_TH, weights, {"x": (x_TH, (len(x_TH), H))})
    if core_TI.shape != (len(x_TH), I) or core_TI.dtype != torch.bool:
        raise ValueError(
            f"sandcat::core_mlp: core is {tuple(core_TI.shape)} {core_TI.dtype}; for {len(x_TH)} tokens and {I} "
            f"neurons it must be {(len(x_TH), I)} torch.bool."
        )


core_mlp = Op("core_mlp", reference)
"""`reference` for 1 to `MAX_TOKENS` tokens, by the kernel of the device where there is one."""


@core_mlp.register_fake
def _(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, core_TI: Tensor, activation: str) -> Tensor:
    return x_TH.new_empty((x_TH.shape[0], down.codes.shape[0]), dtype=torch.float32)
