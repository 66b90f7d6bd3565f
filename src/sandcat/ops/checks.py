"""What all ops ask of their arguments."""

from __future__ import annotations

from torch import Tensor

from sandcat.ops.weights import FORMATS, Stored

MAX_TOKENS = 16
"""Most tokens that the kernels take at once. What any of them keeps is read, so more tokens would gain nothing."""

LARGE = 2**20
"""Numbers of a weight matrix from which on a CPU spends its time on reading it, not on calling a kernel."""

PROMPT_CHUNK = 1024
"""Tokens that the dense form computes at once, so that a prompt's intermediate states stay bounded."""


def check_tensors(
    op: str,
    x: Tensor,
    weights: dict[str, tuple[Stored | None, tuple]],
    shapes: dict[str, tuple[Tensor | None, tuple]],
) -> None:
    """Every tensor has its shape, lies where x does, and has x's dtype, or codes that of their format.

    Args:
        weights: by name, matrices and their shapes [outputs, inputs].
        shapes: the other tensors, and what their shapes must be.

    Raises:
        ValueError: one has not, or there are too many tokens.
    """
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"sandcat::{op} takes 1 to {MAX_TOKENS} tokens, got {len(x)}.")
    expected = {name: (tensor, shape, x.dtype) for name, (tensor, shape) in shapes.items()}
    for name, (weight, shape) in weights.items():
        if weight is None:
            continue
        dtype = FORMATS[weight.format].codes
        expected[f"codes of {name}, {weight.format}"] = weight.codes, shape, dtype or x.dtype
        expected |= {f"{part} of {name}": (getattr(weight, part), shape[:1], x.dtype) for part in ("scale", "bias")}
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device):
            raise ValueError(
                f"sandcat::{op}: {name}: {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; with x in "
                f"{x.dtype} on {x.device} it must be {tuple(shape)} {dtype}, there."
            )
