"""Ops and their references with what matrices are stored as written out, so that a test can change one tensor by its
place: codes, each as rows of the units that can be skipped; then biases; then scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sandcat import ops
from sandcat.ops.op import Op
from sandcat.ops.weights import FORMATS, Stored

NAMES = {row.codes: name for name, row in FORMATS.items()}


def stored(codes, bias=None, scale=None) -> Stored:
    return Stored(codes, scale, None, bias, NAMES.get(codes.dtype, "float"))


def _stored_linear(x, weight, scale, bias=None):
    return x, stored(weight, bias, scale)


def _linear(x, weight, threshold, bias=None, scale=None):
    return x, stored(weight.t(), bias, scale), threshold


def _up(x, a, up, threshold, bias=None, scale=None):
    return x, a, stored(up, bias, scale), threshold


def _up_down(x, a, up, down, threshold, up_bias=None, down_bias=None, up_scale=None, down_scale=None):
    return x, a, stored(up, up_bias, up_scale), stored(down.t(), down_bias, down_scale), threshold


def _mlp(x, gate, up, down, limit, activation, *small):
    biases, scales = (*small[:3], *[None] * 3)[:3], (*small[3:], *[None] * 3)[:3]
    matrices = (stored(*parts) for parts in zip((gate, up, down.t()), biases, scales, strict=True))
    return x, *matrices, limit, activation


class WrittenOut:
    """Called with the arguments of `whole`."""

    def __init__(self, run: Op | Callable, whole: Callable[..., tuple]):
        self.run, self.whole = run, whole

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.run(*self.whole(*args))

    def opcheck(self, *args: Any, **options: Any) -> None:
        torch.library.opcheck(self.run.op, self.run.flat(*self.whole(*args)), **options)


def of(run: Op | Callable, name: str) -> WrittenOut:
    """Something that is called as the op of that name is."""
    return WrittenOut(run, {
        "stored_linear": _stored_linear, "sparse_linear": _linear, "shared_linear": _linear, "sparse_up": _up,
        "sparse_up_down": _up_down, "shared_up_down": _up_down, "sparse_mlp": _mlp, "core_mlp": _mlp,
    }[name])  # fmt: skip


def both(name: str) -> tuple[WrittenOut, WrittenOut]:
    """An op and its reference."""
    op = getattr(ops, name)
    return of(op, name), of(op.reference, name)
