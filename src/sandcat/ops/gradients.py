"""Gradients of ops: those of their references, computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(op: Any, reference: Callable[..., Tensor]) -> None:
    """Gives an op the gradients of its reference, with respect to all its floating-point arguments.

    What is dropped gives none: weights that a token skips get zero, as they do not enter its output, and thresholds get
    none at all, as what is above them passes whole. The forward pass saves its arguments and nothing else.
    """

    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))

    def backward(ctx: Any, gradient: Tensor) -> tuple:
        arguments, found = list(ctx.rest), [None] * len(ctx.rest)
        wanted = []
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = tensor.detach()
            if ctx.needs_input_grad[place]:
                arguments[place].requires_grad_()
                wanted.append(place)
        with torch.enable_grad():
            output = reference(*arguments)
        gradients = torch.autograd.grad(output, [arguments[p] for p in wanted], gradient, allow_unused=True)
        for place, tensor in zip(wanted, gradients, strict=True):
            found[place] = tensor
        return tuple(found)

    op.register_autograd(backward, setup_context=save)
