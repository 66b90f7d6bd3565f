"""Rows of a report that nothing else makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CurvePoint:
    """One recipe of a sweep over sparsity."""

    recipe: str
    sparsity: float
    """Share of neurons to drop, as asked for."""
    perplexity_ratio: float
    """Sparse perplexity over dense, with its standard error."""
    ratio_error: float
    kl: float
    """Nats a token."""
    bytes_ratio: float | None
    """Bytes of weights that a sparse step of one token reads over those of a dense one; None if not counted."""


@dataclass(frozen=True)
class Sample:
    """What both models write after one prompt."""

    prompt: str
    dense: str
    sparse: str
