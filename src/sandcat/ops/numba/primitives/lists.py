"""Lists of units that several tokens share."""

from __future__ import annotations

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.dtypes import widen
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.shared_units import GROUP, LEAST_THRESHOLD

_LEAST, _INFINITY, _ONE = np.float32(LEAST_THRESHOLD), np.float32(np.inf), np.float32(1)


@njit
def list_shared(scores, threshold, units):
    """Writes the shared units in order, and returns how many they are; `scores` [B, U] may have signs."""
    apart()
    sequences, size = scores.shape
    total, inverse = np.zeros(size, np.float32), np.empty(size, np.float32)
    kept = np.zeros(size, np.int32)
    for u in range(size):
        t = widen(threshold[u])
        inverse[u] = _ONE / (t if t > _LEAST else _LEAST)
    for b in range(sequences):
        for u in range(size):
            score = abs(widen(scores[b, u]))
            kept[u] += not score <= widen(threshold[u])
            ratio = score * inverse[u]
            total[u] += ratio * ratio
    n = 0
    for first in range(0, size, GROUP):
        end = min(first + GROUP, size)
        wanted = 0
        for u in range(first, end):
            wanted += kept[u]
            if total[u] != total[u]:
                total[u] = _INFINITY
        wanted = (2 * wanted + sequences - 1 + wanted // sequences % 2) // (2 * sequences)
        for u in range(first, end):
            place = 0
            for other in range(first, end):
                place += (total[other] > total[u]) | ((total[other] == total[u]) & (other < u))
            if place < wanted:
                units[n] = u
                n += 1
    return n
