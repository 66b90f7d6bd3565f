"""Numbers of fewer bits than float32, widened and narrowed as NumPy does it."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from sandcat.ops.numba.primitives.dtypes import narrow, rounded, widen


@njit
def widen_all(codes, out):
    for i in range(codes.size):
        out[i] = widen(codes[i])


@njit
def narrow_all(numbers, codes, near):
    for i in range(numbers.size):
        codes[i], near[i] = narrow(numbers[i], codes[i]), rounded(numbers[i], codes[i])


def test_float16_and_back():
    """All codes; halfway between them and beside that, and what is too large, too small or no number."""
    codes = np.arange(-(2**15), 2**15).astype(np.int16)
    want, found = codes.view(np.float16).astype(np.float32), np.empty(2**16, np.float32)
    widen_all(codes, found)
    assert np.array_equal(found, want, equal_nan=True) and np.array_equal(np.signbit(found), np.signbit(want))
    finite = np.sort(want[np.isfinite(want)])
    middle = (finite[1:] + finite[:-1]) / 2
    rest = np.array([65519, 65520, 65536, 1e30, np.inf, np.nan, 2**-25, 2**-26, 1e-30, 0], np.float32)
    numbers = np.concatenate([want, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), rest, -rest])
    found, near = np.empty(numbers.size, np.int16), np.empty(numbers.size, np.float32)
    narrow_all(numbers.astype(np.float32), found, near)
    with np.errstate(over="ignore"):
        want = numbers.astype(np.float16)
    assert np.array_equal(found.view(np.float16), want, equal_nan=True)
    assert np.array_equal(np.signbit(found.view(np.float16)), np.signbit(want))
    assert np.array_equal(near, want.astype(np.float32), equal_nan=True)


def test_e4m3():
    """All codes but the two that are NaN, over 256."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    found = np.empty(codes.size, np.float32)
    widen_all(codes, found)
    assert torch.equal(torch.tensor(found), torch.tensor(codes).view(torch.float8_e4m3fn).float() / 256)
