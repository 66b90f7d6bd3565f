"""Products of several tokens by rows of a matrix, on the processor's matrix unit and without it, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import assert_close
from numba import njit

from sandcat.ops.numba.tiles import HAS_TILES, add_rows_tiled, dot_rows_tiled, pack_columns, release, room_of
from sandcat.ops.numba.vectors import add_rows, dot_rows


@njit
def by_tiles(x, rows, units, out, y, h, columns, first, room):
    """Both products in one function, as another library's use of the unit between two calls would spoil it."""
    pack_columns(x, room)
    dot_rows_tiled(x, rows, units, out, room)
    add_rows_tiled(y, h, columns, units, room, first)
    release()


@njit
def by_vectors(x, rows, units, out, y, h, columns, first, room):
    dot_rows(x, rows, units, out)
    add_rows(y, h, columns, units, first)


KINDS = [
    pytest.param(by_tiles, marks=pytest.mark.skipif(not HAS_TILES, reason="needs a processor with AMX")),
    by_vectors,
]


@pytest.mark.parametrize("product", KINDS, ids=["tiles", "vectors"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
def test_equals_numpy(product, stored):
    random = np.random.default_rng(0)
    for tokens in (1, 2, 3, 4, 7, 16):
        for inputs, outputs, listed in [(1, 5, 5), (63, 40, 33), (576, 33, 16), (129, 191, 77), (4097, 70, 70), (40, 8, 0)]:
            x, h = (
                torch.tensor(random.standard_normal((tokens, n)), dtype=torch.bfloat16).float() for n in (inputs, listed)
            )
            rows = torch.tensor(random.standard_normal((outputs, inputs)) * 50).to(stored)
            units = np.sort(random.permutation(outputs)[:listed])
            out, start = np.full((tokens, listed), np.nan, np.float32), random.standard_normal((tokens, inputs - 1))
            y = np.full((tokens, inputs + 3), np.nan, np.float32)[:, 1:inputs]  # rows that are not aligned
            y[:] = start
            codes = rows.numpy() if stored == torch.int8 else rows.view(torch.uint16).numpy()
            room = np.zeros(room_of(max(inputs, listed, 32)), np.int32)
            product(x.numpy(), codes, units, out, y, h.numpy(), codes, 1, room)
            kept = rows.double()[units]
            assert_close(torch.tensor(out), x.double() @ kept.T, torch.float32)
            want = torch.tensor(start) + h.double() @ kept[:, 1:]
            assert_close(torch.tensor(y), want, torch.float32)
