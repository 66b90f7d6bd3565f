"""What all ops ask of their arguments."""

from __future__ import annotations

from torch import Tensor

MAX_TOKENS = 8
"""Most tokens that the kernels take at once. What any of them keeps is read, so more tokens would gain nothing."""

PROMPT_CHUNK = 1024
"""Tokens that the dense form computes at once, so that a prompt's intermediate states stay bounded."""


def check_shapes(
    op: str, x: Tensor, weight: tuple[str, Tensor], shapes: dict[str, tuple[Tensor | None, tuple]]
) -> None:
    """Every tensor has its shape, and the dtype and device of the weight.

    Raises:
        ValueError: one has not, or there are too many tokens.
    """
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"sandcat::{op} takes 1 to {MAX_TOKENS} tokens, got {len(x)}.")
    known, like = weight
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device):
            raise ValueError(
                f"sandcat::{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; with a {known} of "
                f"{' x '.join(map(str, like.shape))} {like.dtype} on {like.device} it must be {shape}, of that dtype, "
                "there."
            )
