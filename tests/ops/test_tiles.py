"""Products of several tokens by rows of a matrix, on the processor's matrix unit and without it, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import assert_close
from numba import njit

from sandcat.ops.numba.primitives.amx import release_tiles
from sandcat.ops.numba.primitives.processor import HAS_TILES
from sandcat.ops.numba.primitives.rows import add_rows, dot_rows
from sandcat.ops.numba.primitives.rows_amx import add_rows_tiled, dot_rows_tiled, pack_columns, room_of


@njit
def by_tiles(x, rows, units, out, y, h, columns, first, room):
    """Both products in one function, as another library's use of the unit between two calls would spoil it."""
    pack_columns(x, room)
    dot_rows_tiled(x, rows, units, out, room)
    add_rows_tiled(y, h, columns, units, room, first)
    release_tiles()


@njit
def by_vectors(x, rows, units, out, y, h, columns, first, room):
    dot_rows(x, rows, units, out)
    add_rows(y, h, columns, units, first)


KINDS = [
    pytest.param(by_tiles, marks=pytest.mark.skipif(not HAS_TILES, reason="needs a processor with AMX")),
    by_vectors,
]


SHAPES = [(1, 5, 5), (63, 40, 33), (576, 33, 16), (129, 191, 77), (4097, 70, 70), (40, 8, 0)]
"""Inputs, rows, and how many of these are listed."""


OTHER = {torch.bfloat16: torch.int8, torch.int8: torch.bfloat16}


def codes(rows: torch.Tensor) -> np.ndarray:
    """As a kernel reads them."""
    return rows.numpy() if rows.dtype == torch.int8 else rows.view(torch.uint16).numpy()


def exact(random: np.random.Generator, *shape: int) -> torch.Tensor:
    """Numbers that bfloat16 has."""
    return torch.tensor(random.standard_normal(shape), dtype=torch.bfloat16).float()


@pytest.mark.parametrize("product", KINDS, ids=["tiles", "vectors"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16])
def test_equals_torch(product, stored, tokens):
    """Products of rows that are stored so, and sums of rows that are stored the other way."""
    random = np.random.default_rng(0)
    for inputs, count, listed in SHAPES:
        x, h, rows = exact(random, tokens, inputs), exact(random, tokens, listed), exact(random, count, inputs)
        rows, columns = ((rows * 50).to(kind) for kind in (stored, OTHER[stored]))
        units = np.sort(random.permutation(count)[:listed])
        out, start = np.full((tokens, listed), np.nan, np.float32), random.standard_normal((tokens, inputs - 1))
        y = np.full((tokens, inputs + 3), np.nan, np.float32)[:, 1:inputs]  # rows that are not aligned
        y[:] = start
        room = np.zeros(room_of(max(inputs, listed, 32)), np.int32)
        product(x.numpy(), codes(rows), units, out, y, h.numpy(), codes(columns), 1, room)
        assert_close(torch.tensor(out), x.double() @ rows.double()[units].T, torch.float32)
        want = torch.tensor(start) + h.double() @ columns.double()[units, 1:]
        assert_close(torch.tensor(y), want, torch.float32)
