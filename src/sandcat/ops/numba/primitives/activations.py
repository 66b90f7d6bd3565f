"""Activations on a CPU, and their codes."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.numba.primitives.dtypes import exp, rounded

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


_SILU, _GELU, _GELU_TANH = CODES["silu"], CODES["gelu"], CODES["gelu_tanh"]


@njit(error_model="numpy")  # a division that may raise is not vectorised
def _silu(g):
    return g / (np.float32(1) + exp(-g))


@njit(inline="always")
def activate(g, code):
    """The activation of that code, of one float32."""
    if code == _SILU:
        return _silu(g)
    if code == _GELU:
        return g * np.float32(0.5) * (np.float32(1) + np.float32(math.erf(g * np.float32(0.7071067811865476))))
    if code == _GELU_TANH:  # (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x))
        return g / (np.float32(1) + exp(np.float32(-1.5957691216057308) * (g + np.float32(0.044715) * g * g * g)))
    return g if g > 0 or g != g else np.float32(0)


@njit
def activate_all(g, code, like):
    """g = its activations, rounded as the model's dtype."""
    if code == _SILU:  # a loop of nothing else is vectorised
        for j in range(g.size):
            g[j] = rounded(_silu(rounded(g[j], like)), like)
        return
    for j in range(g.size):
        g[j] = rounded(activate(rounded(g[j], like), code), like)
