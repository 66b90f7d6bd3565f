"""Attention of one decode step on a CPU, over a part of the cache of each key-value head at a time.

Shapes: B sequences, D size of a head, G query heads a key-value head, L positions of the cache. The tables are those of
step.py.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.dtypes import exp, narrow, rounded, widen
from sandcat.ops.numba.primitives.registers import LANES, apart, fma, load, splat, store, totals
from sandcat.ops.numba.primitives.rows import add_rows, norm
from sandcat.ops.numba.primitives.rows_streamed import dot, rest
from sandcat.ops.numba.primitives.threads import float32s, numbers

POSITIONS = 256
"""Positions that all query heads of a group look at before the next ones, so that these stay in the cache."""


def parts_of(threads: int, heads: int) -> int:
    """Parts that the cache of each of so many key-value heads is cut into, so that all threads have as many."""
    return threads // math.gcd(threads, heads)


@njit
def _rotate(x, cos, sin):
    """The rotary embedding of one head, in place."""
    half = x.size // 2
    low, high, low_cos, high_cos, low_sin, high_sin = x[:half], x[half:], cos[:half], cos[half:], sin[:half], sin[half:]
    for d in range(half):
        a, b = low[d], high[d]
        low[d] = _sum_of_products(a, low_cos[d], -b, low_sin[d])
        high[d] = _sum_of_products(b, high_cos[d], a, high_sin[d])


@njit
def _sum_of_products(a, b, c, d):
    return rounded(rounded(a * widen(b), b) + rounded(c * widen(d), d), b)


@njit
def _head(values, weight, eps, cos, sin, out, like):
    """A query or key head: RMSNorm where there is one, then the rotary embedding, rounded as transformers rounds."""
    if weight:
        norm(values, numbers(weight, (values.size,), like), eps, out)
    else:
        for d in range(out.size):
            out[d] = values[d]
    _rotate(out, cos, sin)


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
            _scores(q[g], keys[at:to], here)
            top, total = acc[D], acc[D + 1]
            acc[D] = _scaled(here, np.float32(layer.scaling), top)
            fade = np.float32(math.exp(top - acc[D]))
            acc[D + 1] = total * fade + _weights(here, acc[D])
            _fade_and_add(acc[:D], fade, here, values[at:to])


@njit
def _scores(q, keys, out):
    """out[p] = key p . q, four keys at a time: they are short, and lie one after another."""
    fours, whole = out.size // 4 * 4, q.size // LANES * LANES
    for p in range(0, fours, 4):
        key0, key1, key2, key3 = keys[p], keys[p + 1], keys[p + 2], keys[p + 3]
        s0 = s1 = s2 = s3 = splat(np.float32(0))
        for d in range(0, whole, LANES):
            v = load(q, d)
            s0, s1 = fma(v, load(key0, d), s0), fma(v, load(key1, d), s1)
            s2, s3 = fma(v, load(key2, d), s2), fma(v, load(key3, d), s3)
        out[p], out[p + 1], out[p + 2], out[p + 3] = totals(s0, s1, s2, s3)
        if whole < q.size:
            for i in range(p, p + 4):
                out[i] += rest(q, keys[i], whole)
    for p in range(fours, out.size):
        out[p] = dot(q, keys[p])


@njit(fastmath={"nnan"})
def _scaled(scores, scaling, top):
    """Scales scores; the largest of them and `top`."""
    for p in range(scores.size):
        scores[p] *= scaling
        top = max(top, scores[p])
    return top


@njit(fastmath={"reassoc"})
def _weights(scores, top):
    """Scores become exp(score - top); their sum."""
    for p in range(scores.size):
        scores[p] = exp(scores[p] - top)
    total = np.float32(0)
    for p in range(scores.size):
        total += scores[p]
    return total


@njit
def _fade_and_add(acc, fade, weights, values):
    """acc = fade * acc + the sum of weighted rows, whose sums stay in registers."""
    width = 4 * LANES
    whole = acc.size // width * width
    for d in range(0, whole, width):
        d1, d2, d3, v = d + LANES, d + 2 * LANES, d + 3 * LANES, splat(fade)
        nothing = splat(np.float32(0))
        a0, a1 = fma(v, load(acc, d), nothing), fma(v, load(acc, d1), nothing)
        a2, a3 = fma(v, load(acc, d2), nothing), fma(v, load(acc, d3), nothing)
        for p in range(weights.size):
            v, row = splat(weights[p]), values[p]
            a0, a1 = fma(v, load(row, d), a0), fma(v, load(row, d1), a1)
            a2, a3 = fma(v, load(row, d2), a2), fma(v, load(row, d3), a3)
        store(acc, d, a0)
        store(acc, d1, a1)
        store(acc, d2, a2)
        store(acc, d3, a3)
    for d in range(whole, acc.size):
        acc[d] *= fade
    if whole < acc.size:
        add_rows(acc[whole:].reshape(1, -1), weights.reshape(1, -1), values, None, whole)


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
