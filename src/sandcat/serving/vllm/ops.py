"""What layers run that are laid out for skipping: kernels for few tokens, and dense products for more, masked alike.

As ops of torch, because how many tokens there are is known only when a step runs: whoever compiles the model sees one
call. Shapes: as in ops/sparse_linear.py and ops/sparse_mlp.py; results are in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sandcat.ops import PROMPT_CHUNK, Stored, most_tokens, sparse_linear, sparse_up, stored_linear
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.op import Op
from sandcat.ops.sparse_linear import reference as masked
from sandcat.ops.sparse_up import reference as masked_up
from sandcat.ops.weights import product

CODED_MOST = 4
"""Sequences up to which kernels of codes are faster than 16-bit products of weights that are packed for those: measured
with int8 at 8192 x 2048 on a CPU, 0.46 and 0.74 ms for 1 sequence, 0.73 and 0.74 ms for 4, 2.5 and 0.71 ms for 16."""


def most_sequences(op: str, weight_OI: Tensor, dtype: torch.dtype, format: str) -> int:
    """Sequences at once up to which an op is faster than an engine's dense layer."""
    most = most_tokens(op, weight_OI.device, dtype, weight_OI.numel(), format)
    return most if format == "float" else min(most, CODED_MOST)


def _linear(x_TI: Tensor, weight: Stored, threshold_I: Tensor | None) -> Tensor:
    """A linear layer with thresholds (its weight stored by channels, as a transposed view), or of codes, or both."""
    op = "stored_linear" if threshold_I is None else "sparse_linear"
    if len(x_TI) > most_tokens(op, x_TI.device, x_TI.dtype, weight.codes.numel(), weight.format):
        if threshold_I is None:
            return _in_chunks(lambda x: product(x, weight), x_TI)
        return _in_chunks(lambda x: masked(x, weight, threshold_I), x_TI)
    if threshold_I is None:
        return stored_linear(x_TI, weight).to(x_TI.dtype)
    return sparse_linear(x_TI, weight, threshold_I).to(x_TI.dtype)


linear = Op("served_linear", _linear, gradients=False)


@linear.register_fake
def _(x_TI: Tensor, weight: Stored, threshold_I: Tensor | None) -> Tensor:
    return x_TI.new_empty((x_TI.shape[0], weight.codes.shape[0]))


def _up(x_TH: Tensor, g_TI: Tensor, up: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    """The up projection of the neurons whose |activation(g)| is above their threshold; 0 for the others."""
    a_TI = ACTIVATIONS[activation](g_TI)
    if len(x_TH) <= most_tokens("sparse_up", x_TH.device, x_TH.dtype, up.codes.numel(), up.format):
        return sparse_up(x_TH, a_TI, up, threshold_I)
    return _in_chunks(lambda x, a: masked_up(x, a, up, threshold_I), x_TH, a_TI)


up = Op("served_up", _up, gradients=False)


@up.register_fake
def _(x_TH: Tensor, g_TI: Tensor, up: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    return torch.empty_like(g_TI, memory_format=torch.contiguous_format)


def _in_chunks(run: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """By few tokens of a prompt at a time, so that what lies between stays small; in x's dtype."""
    found = [run(*parts).to(x.dtype) for parts in zip(*(t.split(PROMPT_CHUNK) for t in (x, *more)), strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)
