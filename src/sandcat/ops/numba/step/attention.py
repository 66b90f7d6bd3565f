"""Attention of one decode step on a CPU, over a part of the cache of each key-value head at a time.

Shapes: B sequences, D size of a head, G query heads a key-value head, L positions of the cache. The tables are those of
step.py.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.attention import fade_and_add, rotate, scale_scores, score_keys, weigh_scores
from sandcat.ops.numba.primitives.dtypes import narrow, rounded
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.numba.primitives.rows import norm
from sandcat.ops.numba.primitives.threads import float32s, numbers

POSITIONS = 256
"""Positions that all query heads of a group look at before the next ones, so that these stay in the cache."""


def parts_of(threads: int, heads: int) -> int:
    """Parts that the cache of each of so many key-value heads is cut into, so that all threads have as many."""
    return threads // math.gcd(threads, heads)


@njit
def _head(values, weight, eps, cos, sin, out, like):
    """A query or key head: RMSNorm where there is one, then the rotary embedding, rounded as transformers rounds."""
    if weight:
        norm(values, numbers(weight, (values.size,), like), eps, out)
    else:
        for d in range(out.size):
            out[d] = values[d]
    rotate(out, cos, sin)


@njit
def attend(model, layer, position, item, q, weights, like):
    """One part of the cache of one key-value head of a sequence: maximum, sum and weighted values of each of its query
    heads."""
    apart()
    B, D, G, parts = model.sequences, model.D, model.heads // model.groups, model.parts
    b, group, part = item // parts // model.groups, item // parts % model.groups, item % parts
    qkv = float32s(model.qkv, (model.rows, (model.heads + 2 * model.groups) * D))[b]
    cos = numbers(model.cos, (model.L, D), like)[position]
    sin = numbers(model.sin, (model.L, D), like)[position]
    keys = numbers(layer.keys, (B, model.groups, model.L, D), like)[b, group]
    values = numbers(layer.values, (B, model.groups, model.L, D), like)[b, group]
    start = max(0, position + 1 - layer.window)
    seen = position + 1 - start
    first, end = start + seen * part // parts, start + seen * (part + 1) // parts
    if end == position + 1:
        k_at = (model.heads + group) * D
        v_at = k_at + model.groups * D
        _head(qkv[k_at : k_at + D], layer.k_norm, layer.head_eps, cos, sin, q[0], like)
        for d in range(D):
            keys[position, d] = narrow(q[0, d], like[0])
            values[position, d] = narrow(qkv[v_at + d], like[0])
    for g in range(G):
        at = (group * G + g) * D
        _head(qkv[at : at + D], layer.q_norm, layer.head_eps, cos, sin, q[g], like)
    results = float32s(model.partial, (B, model.heads * parts, D + 2))[b]
    for g in range(G):
        result = results[(group * G + g) * parts + part]
        for d in range(D + 2):
            result[d] = 0
        result[D] = -np.inf
    for at in range(first, end, POSITIONS):
        to = min(end, at + POSITIONS)
        here = weights[: to - at]
        for g in range(G):
            acc = results[(group * G + g) * parts + part]
            score_keys(q[g], keys[at:to], here)
            top, total = acc[D], acc[D + 1]
            acc[D] = scale_scores(here, np.float32(layer.scaling), top)
            fade = np.float32(math.exp(top - acc[D]))
            acc[D + 1] = total * fade + weigh_scores(here, acc[D])
            fade_and_add(acc[:D], fade, here, values[at:to])


@njit
def joined(model, x, like):
    """x = the heads' outputs, joined from the parts of the cache."""
    B, D, parts = model.sequences, model.D, model.parts
    results = float32s(model.partial, (B, model.heads, parts, D + 2))
    for b in range(B):
        for head in range(model.heads):
            out, result = x[b, head * D : (head + 1) * D], results[b, head]
            top = result[0, D]
            for part in range(1, parts):
                top = max(top, result[part, D])
            total = np.float32(0)
            for d in range(D):
                out[d] = 0
            for part in range(parts):
                weight = np.float32(math.exp(result[part, D] - top))
                total += weight * result[part, D + 1]
                for d in range(D):
                    out[d] += weight * result[part, d]
            for d in range(D):
                out[d] = rounded(out[d] / total, like)
