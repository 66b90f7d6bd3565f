"""What all ops ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TOKENS = 16
"""Most tokens that the kernels take at once. What any of them keeps is read, so more tokens would gain nothing."""

LARGE = 2**20
"""Numbers of a weight matrix from which on a CPU spends its time on reading it, not on calling a kernel."""

PROMPT_CHUNK = 1024
"""Tokens that the dense form computes at once, so that a prompt's intermediate states stay bounded."""


def check_tensors(
    op: str,
    x: Tensor,
    weights: dict[str, tuple[Tensor | None, Tensor | None, int]],
    shapes: dict[str, tuple[Tensor | None, tuple]],
) -> None:
    """Every tensor has its shape, lies where x does, and has x's dtype; a weight that has a scale is int8.

    Args:
        weights: by name, the weight, its scale or None, and how many outputs it has.
        shapes: all tensors but the scales, the weights among them, and what their shapes must be.

    Raises:
        ValueError: one has not, or there are too many tokens.
    """
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"sandcat::{op} takes 1 to {MAX_TOKENS} tokens, got {len(x)}.")
    int8 = {name for name, (_, scale, _) in weights.items() if scale is not None}
    expected = {name: (t, shape, torch.int8 if name in int8 else x.dtype) for name, (t, shape) in shapes.items()}
    expected |= {f"{name}_scale": (scale, (outputs,), x.dtype) for name, (_, scale, outputs) in weights.items()}
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device):
            raise ValueError(
                f"sandcat::{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; with x in "
                f"{x.dtype} on {x.device} it must be {tuple(shape)} {dtype}, there "
                "(weights are int8 iff they have scales)."
            )
