"""Products and sums of rows on a CPU, by whatever this processor has for them, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from sandcat.ops.numba.primitives.rows import add_rows, dot_rows

MOST = 50
TOKENS = [1, 2, 3, 4, 5, 7, 8, 16]


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 with nothing where bfloat16 has nothing."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def stored(rows: np.ndarray, storage: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a kernel reads them, and the numbers that they are."""
    if storage == "int8":
        rows = np.clip(np.round(rows * 50), -127, 127)
        return rows.astype(np.int8), rows
    if storage == "float16":
        return rows.astype(np.float16).view(np.int16), rows.astype(np.float16).astype(np.float32)
    if storage == "float32":
        return rows.astype(np.float32), rows.astype(np.float32)
    return (as_bfloat16(rows).view(np.uint32) >> 16).astype(np.uint16), as_bfloat16(rows)


@njit
def dot(x, rows, units, out):
    dot_rows(x, rows, units, out)


@njit
def add(y, h, rows, units, first):
    add_rows(y, h, rows, units, first)


def assert_near(found: np.ndarray, want: np.ndarray, scale: np.ndarray) -> None:
    assert (np.abs(found - want) <= 2e-6 * scale).all()


@pytest.mark.parametrize("exact", [True, False], ids=["bfloat16", "other numbers"])
@pytest.mark.parametrize("storage", ["bfloat16", "int8", "float32", "float16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_of_any_size(tokens, storage, exact):
    """Of all rows, and of a list."""
    check(tokens, storage, exact, all_rows=True)
    check(tokens, storage, exact, all_rows=False)


def check(tokens: int, storage: str, exact: bool, *, all_rows: bool) -> None:
    """Tokens, numbers and rows that fill registers and blocks, and that do not."""
    random = np.random.default_rng(tokens)
    given = as_bfloat16 if exact else np.float32
    for size in (7, 32, 64, 96, 100, 576):
        for count in (1, 3, 4, 9, MOST):
            rows, values = stored(random.standard_normal((count, size)), storage)
            some = np.sort(random.choice(count, max(1, count // 2), replace=False))
            units = None if all_rows else some
            kept = (values if all_rows else values[some]).astype(np.float64)
            x = given(random.standard_normal((tokens, size)))
            out = np.full((tokens, len(kept)), np.nan, np.float32)
            dot(x, rows, units, out)
            assert_near(out, x @ kept.T, np.abs(x) @ np.abs(kept.T))
            for first in (0, 3):
                h = given(random.standard_normal((tokens, len(kept))))
                y = random.standard_normal((tokens, size - first)).astype(np.float32)
                want, scale = y + h @ kept[:, first:], np.abs(y) + np.abs(h) @ np.abs(kept[:, first:])
                add(y, h, rows, units, first)
                assert_near(y, want, scale)
