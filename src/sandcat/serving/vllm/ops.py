"""What layers run that are laid out for skipping: kernels for few tokens, and dense products for more, masked alike.

As ops of torch, because how many tokens there are is known only when a step runs: whoever compiles the model sees one
call. Shapes: as in ops/sparse_linear.py and ops/sparse_mlp.py; results are in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sandcat.ops import PROMPT_CHUNK, int8_linear, most_tokens, sparse_linear, sparse_up
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.sparse_linear import reference as masked
from sandcat.ops.sparse_up import reference as masked_up
from sandcat.ops.weights import product

INT8_MOST = 4
"""Sequences up to which int8 kernels are faster than 16-bit products of weights that are packed for those: measured at
8192 x 2048 on a CPU, 0.46 and 0.74 ms for 1 sequence, 0.73 and 0.74 ms for 4, 2.5 and 0.71 ms for 16."""


def most_sequences(op: str, weight_OI: Tensor, dtype: torch.dtype, int8: bool) -> int:
    """Sequences at once up to which an op is faster than an engine's dense layer."""
    most = most_tokens(op, weight_OI.device, dtype, weight_OI.numel(), int8)
    return min(most, INT8_MOST) if int8 else most


@torch.library.custom_op("sandcat::served_linear", mutates_args=())
def linear(
    x_TI: Tensor, weight_OI: Tensor, threshold_I: Tensor | None, bias_O: Tensor | None, scale_O: Tensor | None
) -> Tensor:
    """A linear layer with thresholds (its weight stored by channels, as a transposed view), or int8, or both."""
    op = "int8_linear" if threshold_I is None else "sparse_linear"
    if len(x_TI) > most_tokens(op, x_TI.device, x_TI.dtype, weight_OI.numel(), scale_O is not None):
        if threshold_I is None:
            return _in_chunks(lambda x: product(x, weight_OI, bias_O, scale_O), x_TI)
        return _in_chunks(lambda x: masked(x, weight_OI.t(), threshold_I, bias_O, scale_O), x_TI)
    if threshold_I is None:
        return int8_linear(x_TI, weight_OI, scale_O, bias_O).to(x_TI.dtype)
    return sparse_linear(x_TI, weight_OI.t(), threshold_I, bias_O, scale_O).to(x_TI.dtype)


@linear.register_fake
def _(x_TI, weight_OI, threshold_I, bias_O, scale_O):
    return x_TI.new_empty((x_TI.shape[0], weight_OI.shape[0]))


@torch.library.custom_op("sandcat::served_up", mutates_args=())
def up(
    x_TH: Tensor,
    g_TI: Tensor,
    up_IH: Tensor,
    threshold_I: Tensor,
    bias_I: Tensor | None,
    scale_I: Tensor | None,
    activation: str,
) -> Tensor:
    """The up projection of the neurons whose |activation(g)| is above their threshold; 0 for the others."""
    a_TI = ACTIVATIONS[activation](g_TI)
    args = (up_IH, threshold_I, bias_I, scale_I)
    if len(x_TH) <= most_tokens("sparse_up", x_TH.device, x_TH.dtype, up_IH.numel(), scale_I is not None):
        return sparse_up(x_TH, a_TI, *args)
    return _in_chunks(lambda x, a: masked_up(x, a, *args), x_TH, a_TI)


@up.register_fake
def _(x_TH, g_TI, up_IH, threshold_I, bias_I, scale_I, activation):
    return torch.empty_like(g_TI, memory_format=torch.contiguous_format)


def _in_chunks(run: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """By few tokens of a prompt at a time, so that what lies between stays small; in x's dtype."""
    found = [run(*parts).to(x.dtype) for parts in zip(*(t.split(PROMPT_CHUNK) for t in (x, *more)), strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)
