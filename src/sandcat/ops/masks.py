"""Zeros in place of what is dropped, for an engine that has its weights packed for many tokens and skips nothing. The
ops `sandcat::mask` and `sandcat::drop_up`, for any number of tokens.

They are called for every layer between products that leave nothing in a CPU's caches, so they are registered without
what `torch.library.custom_op` puts around an op: that took 10 to 25 us a call. Shapes: T tokens, I input channels of a
layer, or neurons of an MLP.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from sandcat.ops.activations import ACTIVATIONS

BITS = {2: torch.int16, 4: torch.int32}
"""Integers of a float's width, in bytes."""


def masked(x_TI: Tensor, threshold_I: Tensor) -> Tensor:
    """The definition: x with zeros where |x| is not above its threshold; NaN is."""
    return torch.where(x_TI.abs() <= threshold_I, 0, x_TI)


def without_dropped(y_T2I: Tensor, bounds_3I: Tensor) -> None:
    """The definition: of what gate and up projections gave, side by side, makes up 0 where the gate drops the neuron.

    Args:
        bounds_3I: of `gate_bounds`.
    """
    g_TI, u_TI = y_T2I.chunk(2, -1)
    place_TI, (above, low, high) = places(g_TI), bounds_3I
    u_TI.masked_fill_(~((place_TI > above) | ((place_TI > low) & (place_TI < high))), 0)


def places(x: Tensor) -> Tensor:
    """Integers in the order of the floats; NaN is past infinity."""
    bits, sign = x.view(BITS[x.itemsize]), 8 * x.itemsize - 1
    return bits ^ ((bits >> sign) & (2**sign - 1))


def gate_bounds(threshold_I: Tensor, activation: str) -> Tensor:
    """Three places (`places`) for each neuron: it is kept if g is above the first, or between the others. [3, I].

    |activation(g)| need not be computed to be compared, and the numbers compared are those that were stored: all of
    `ACTIVATIONS` rise from 0 at 0 on, and on the negative side |activation| rises to one peak and falls to 0 again. So
    g is kept above one bound, and between two negative ones if the peak is above the threshold. Exact in 16 bits; in
    float32 but for g whose activation is the threshold but for rounding.

    Args:
        threshold_I: not negative.
    """
    act, dtype = ACTIVATIONS[activation], threshold_I.dtype

    def number(k_I: Tensor) -> Tensor:
        """The k-th number of the dtype above 0, or below."""
        size_I = k_I.abs().to(BITS[dtype.itemsize]).view(dtype)
        return torch.where(k_I < 0, -size_I, size_I)

    def is_dropped(k_I: Tensor) -> Tensor:
        return act(number(k_I)).abs() <= threshold_I

    def last_dropped(start: int, end: int) -> Tensor:
        """The last number on the way from one that is dropped to one that is kept."""
        dropped_I, kept_I = (torch.full_like(threshold_I, k, dtype=torch.int64) for k in (start, end))
        for _ in range(8 * dtype.itemsize):
            middle_I = (dropped_I + kept_I) // 2
            dropped = is_dropped(middle_I)
            dropped_I, kept_I = torch.where(dropped, middle_I, dropped_I), torch.where(dropped, kept_I, middle_I)
        return places(number(dropped_I))

    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(BITS[dtype.itemsize]))
    negative = torch.linspace(-8, 0, 2**16).to(dtype)
    peak = -int((-negative[act(negative).abs().argmax()]).view(BITS[dtype.itemsize]))
    none_I = is_dropped(torch.full_like(threshold_I, peak, dtype=torch.int64))
    low, high = (last_dropped(start, peak).masked_fill(none_I, 0) for start in (1 - infinity, 0))
    return torch.stack([last_dropped(0, infinity), low, high])


def _by_numba(name: str) -> Callable:
    """A kernel that is imported when it is first called; see `ops.registry`."""
    kernel = None

    def run(*args):
        nonlocal kernel
        kernel = kernel or getattr(importlib.import_module("sandcat.ops.numba.masks"), name)
        return kernel(*args)

    return run


_library = torch.library.Library("sandcat", "FRAGMENT")
_library.define("mask(Tensor x, Tensor threshold) -> Tensor")
_library.define("drop_up(Tensor(a!) y, Tensor bounds) -> ()")
for _name, _definition in {"mask": masked, "drop_up": without_dropped}.items():
    _library.impl(_name, _definition, "CompositeExplicitAutograd")
    if importlib.util.find_spec("numba") is not None:
        _library.impl(_name, _by_numba(_name), "CPU")
torch.library.register_fake("sandcat::mask", lambda x, threshold: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("sandcat::drop_up", lambda y, bounds: None, lib=_library)
mask: Callable[[Tensor, Tensor], Tensor] = torch.ops.sandcat.mask.default
"""`masked`, in x's dtype."""
drop_up: Callable[[Tensor, Tensor], None] = torch.ops.sandcat.drop_up.default
"""`without_dropped`, in place."""
