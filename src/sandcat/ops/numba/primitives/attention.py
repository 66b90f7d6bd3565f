"""What attention is made of on a CPU: the rotary embedding, scores of keys, their weights, and sums of weighted values,
in float32 whatever keys and values are stored as."""

from __future__ import annotations

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.dtypes import exp, rounded, widen
from sandcat.ops.numba.primitives.registers import LANES, apart, fma, load, splat, store, totals
from sandcat.ops.numba.primitives.rows_streamed import dot, rest


@njit
def rotate(x, cos, sin):
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
def score_keys(q, keys, out):
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
def scale_scores(scores, scaling, top):
    """Scales scores; the largest of them and `top`."""
    for p in range(scores.size):
        scores[p] *= scaling
        top = max(top, scores[p])
    return top


@njit(fastmath={"reassoc"})
def weigh_scores(scores, top):
    """Scores become exp(score - top); their sum."""
    for p in range(scores.size):
        scores[p] = exp(scores[p] - top)
    total = np.float32(0)
    for p in range(scores.size):
        total += scores[p]
    return total


@njit
def fade_and_add(acc, fade, weights, values):
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
    lanes = acc.size // LANES * LANES
    for d in range(whole, lanes, LANES):
        a0 = fma(splat(fade), load(acc, d), splat(np.float32(0)))
        for p in range(weights.size):
            a0 = fma(splat(weights[p]), load(values[p], d), a0)
        store(acc, d, a0)
    if lanes < acc.size:
        _fade_and_add_rest(acc, fade, weights, values, lanes)


@njit
def _fade_and_add_rest(acc, fade, weights, values, lanes):
    """The same of what comes after whole registers."""
    apart()
    for d in range(lanes, acc.size):
        acc[d] *= fade
    for p in range(weights.size):
        row = values[p]
        for d in range(lanes, acc.size):
            acc[d] += weights[p] * widen(row[d])
