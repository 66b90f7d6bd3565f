"""Units on the edge: where a rounding decides whether one is kept, two right kernels differ by all of it. To compare
them, both keep such units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sandcat.layers.op_module import kernel_modules
from sandcat.layers.sparse_module import Thresholded
from sandcat.ops.shared_units import near_the_cut

ROUNDINGS = 4
"""Of a threshold and of a typical score, within which either decision over a unit is right."""


def thresholded(model: nn.Module) -> list[Thresholded]:
    """The modules of a model that have thresholds."""
    return [module for module in kernel_modules(model).values() if isinstance(module, Thresholded)]


@contextmanager
def thresholds_restored(modules: list[Thresholded]) -> Iterator[None]:
    """Puts the thresholds back at the end."""
    thresholds = [module.threshold for module in modules]
    try:
        yield
    finally:
        for module, threshold in zip(modules, thresholds, strict=True):
            module.threshold = threshold


@contextmanager
def off_the_edge(model: nn.Module) -> Iterator[None]:
    """Within this context each module keeps, from when it runs on, what was on the edge then; see
    `thresholds_restored`."""
    with ExitStack() as stack:
        for module in thresholded(model):
            hook = module.register_forward_pre_hook(lambda m, args: keep_what_is_near(m, args[0]))
            stack.callback(hook.remove)
        yield


def keep_what_is_near(module: Thresholded, x: Tensor) -> None:
    """Gives units that x [..., H] brings to the edge the threshold -1, which nothing is below."""
    scores, before = module.scores(x), module.threshold
    margin_U = ROUNDINGS * torch.finfo(x.dtype).eps * (before.float() + scores.float().median())
    near = (scores - before).float().abs() <= margin_U
    while near.any():
        module.threshold = torch.where(near.flatten(0, -2).any(0), -1, module.threshold)
        if not module.shares(x):
            return
        # what is kept now may have brought others to the edge
        near = near_the_cut(scores, module.threshold, margin_U) & (module.threshold >= 0)
