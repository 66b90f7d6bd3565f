"""Products of several tokens in bfloat16 by the processor's matrix unit, where it has one.

One instruction adds the products of two tiles, so 16 tokens take the time of one. Weights of any layout and of int8 are
paired on their way, in a scratch that stays in the cache: what is stored as bfloat16 or int8 is exact, and so are
activations, which are rounded to bfloat16 already.

Shapes: T tokens, C units, I inputs, O outputs, as in rows.py.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sandcat.ops.numba.primitives.amx import (
    configure_tiles,
    load_tile,
    multiply_tiles,
    store_bfloat16,
    store_paired,
    store_tile,
    transpose,
    zero_tile,
)
from sandcat.ops.numba.primitives.dtypes import widen
from sandcat.ops.numba.primitives.registers import LANES, LINE, apart, ask, fma, load, splat, store
from sandcat.ops.numba.primitives.rows import add_rows, dot_rows
from sandcat.ops.numba.primitives.rows_streamed import row_of

PAIRED = 2 * LANES
"""Inputs that one tile takes."""
TILE = LANES * LANES
"""Pairs in a tile, 4 bytes each."""
SEGMENT = 128
"""Outputs of a pair of rows that are read in one go: pieces of memory long enough to come fast, and all rows of a tile
side by side still fit the nearest cache."""
DEEP = 2
"""Chunks of `PAIRED` inputs that are added to a segment's sums while these are in tiles."""
PAIRS = SEGMENT * LANES
"""Pairs of numbers that a chunk of a segment has."""
HEAD = LANES + DEEP * PAIRS
"""Where in a thread's room the packed tokens begin, after the settings of the unit and the paired weights."""


def room_of(most: int) -> int:
    """Numbers of 32 bits that a thread needs for products of up to 16 tokens with up to `most` inputs."""
    return HEAD + 2 * LANES * -(-most // PAIRED) * LANES


@njit
def _shape(room, tokens):
    """Tiles 0 to 3 are sums, 4 and 5 are first factors, 6 and 7 are second ones; 16 x 16, but as many rows as `tokens`
    where these are the rows."""
    settings = room[:LANES].view(np.uint8)
    settings[:] = 0
    settings[0] = 1
    widths, rows = settings[16:32].view(np.uint16), settings[48:56]
    for tile in range(8):
        widths[tile] = 4 * LANES
        rows[tile] = tokens if tile < 6 else LANES
    configure_tiles(room, 0)


@njit
def dot_rows_tiled(x, rows, units, out, room):
    """`dot_rows` by tiles, after `pack_columns(x, room)`; `room`: see `room_of`."""
    apart()
    count, chunks = out.shape[1], x.shape[1] // PAIRED
    whole = count // LANES * LANES if chunks else 0
    if whole:
        _shape(room, LANES)
        pairs, packed = room[LANES:HEAD], room[HEAD:]
        for first in range(0, whole, LANES):
            ahead = min(first + LANES, whole - LANES)
            zero_tile(0)
            zero_tile(1)
            for chunk in range(0, chunks - 1, 2):
                at = chunk * PAIRED
                _copy_inputs(rows, units, first, ahead, at, pairs, 0)
                _copy_inputs(rows, units, first, ahead, at + PAIRED, pairs, TILE)
                load_tile(4, pairs, 0, LINE)
                load_tile(6, packed, chunk * TILE, LINE)
                multiply_tiles(0, 4, 6)
                load_tile(5, pairs, TILE, LINE)
                load_tile(7, packed, (chunk + 1) * TILE, LINE)
                multiply_tiles(1, 5, 7)
            if chunks % 2:
                _copy_inputs(rows, units, first, ahead, (chunks - 1) * PAIRED, pairs, 0)
                load_tile(4, pairs, 0, LINE)
                load_tile(6, packed, (chunks - 1) * TILE, LINE)
                multiply_tiles(0, 4, 6)
            store_tile(0, pairs, 0, LINE)
            store_tile(1, pairs, TILE, LINE)
            transpose(pairs, 0)
            transpose(pairs, TILE)
            found = pairs.view(np.float32)
            one = splat(np.float32(1))
            for t in range(len(x)):
                store(out[t], first, fma(load(found, t * LANES), one, load(found, TILE + t * LANES)))
        _add_last_inputs(x, rows, units, chunks * PAIRED, out[:, :whole])
    if whole < count:
        if units is None:
            dot_rows(x, rows[whole:], None, out[:, whole:])
        else:
            dot_rows(x, rows, units[whole:], out[:, whole:])


@njit
def pack_columns(x, room):
    """Keeps x [T, I] in `room` as tiles of pairs [chunk, pair, token], zero after the last token."""
    apart()
    packed = room[HEAD:]
    for chunk in range(x.shape[1] // PAIRED):
        at, to = chunk * PAIRED, chunk * TILE
        for t in range(len(x)):
            store_bfloat16(packed, to + t * LANES, x[t], at)
        packed[to + len(x) * LANES : to + TILE] = 0
        transpose(packed, to)


@njit
def _copy_inputs(rows, units, first, ahead, at, pairs, to):
    """pairs[to:] = 32 inputs of 16 rows; those of the rows ahead are asked for."""
    for r in range(LANES):
        ask(rows[row_of(units, ahead + r)], at)
        store_bfloat16(pairs, to + r * LANES, rows[row_of(units, first + r)], at)


@njit
def _add_last_inputs(x, rows, units, first, out):
    """Inputs that fill no tile."""
    if first < x.shape[1]:
        for c in range(out.shape[1]):
            row = rows[row_of(units, c)]
            for t in range(len(x)):
                for k in range(first, x.shape[1]):
                    out[t, c] += x[t, k] * widen(row[k])


@njit
def add_rows_tiled(y, h, rows, units, room, first=0):
    """`add_rows` by tiles; `room`: see `room_of`."""
    apart()
    tokens, count = h.shape
    whole, chunks = y.shape[1] // PAIRED * PAIRED, -(-count // PAIRED)
    if whole and count:
        _shape(room, tokens)
        pairs, packed = room[LANES:HEAD], room[HEAD + (len(room) - HEAD) // 2 :]
        _pack_rows(h, chunks, packed)
        stride = y.strides[0]
        for chunk in range(0, chunks, DEEP):
            end = min(chunk + DEEP, chunks)
            for at in range(0, whole, SEGMENT):
                to = min(at + SEGMENT, whole)
                for c in range(chunk, end):
                    follows, follows_at = c + 1, at
                    if follows == end:
                        follows, follows_at = (chunk, to) if to < whole else (end, 0)
                    place = (c - chunk) * PAIRS
                    _pair_outputs(rows, units, count, c, first + at, to - at, follows, first + follows_at, pairs, place)
                for o in range(at, to, PAIRED):
                    load_tile(0, y, o, stride)
                    load_tile(1, y, o + LANES, stride)
                    for c in range(chunk, end):
                        place = (c - chunk) * PAIRS + (o - at) * LANES
                        load_tile(4, packed, c * LANES * tokens, LINE)
                        load_tile(6, pairs, place, LINE)
                        load_tile(7, pairs, place + TILE, LINE)
                        multiply_tiles(0, 4, 6)
                        multiply_tiles(1, 4, 7)
                    store_tile(0, y, o, stride)
                    store_tile(1, y, o + LANES, stride)
    if whole < y.shape[1]:
        add_rows(y[:, whole:], h, rows, units, first + whole)


@njit
def _pack_rows(h, chunks, packed):
    """h [T, C] as tiles of pairs [chunk, token, pair], zero after the last."""
    tokens, count = h.shape
    last = np.zeros(PAIRED, np.float32)
    for t in range(tokens):
        for chunk in range(chunks):
            at, to = chunk * PAIRED, (chunk * tokens + t) * LANES
            if at + PAIRED <= count:
                store_bfloat16(packed, to, h[t], at)
            else:
                for c in range(at, count):
                    last[c - at] = h[t, c]
                store_bfloat16(packed, to, last, 0)


@njit
def _pair_outputs(rows, units, count, chunk, at, size, follows, follows_at, pairs, place):
    """pairs[place:] = `size` outputs from `at` on of the chunk's listed rows, of the last one again after it. Those of
    the chunk that follows are asked for."""
    line = LINE // rows.itemsize
    for pair in range(LANES):
        c = chunk * PAIRED + 2 * pair
        low, high = rows[row_of(units, min(c, count - 1))], rows[row_of(units, min(c + 1, count - 1))]
        n = follows * PAIRED + 2 * pair
        next_low, next_high = rows[row_of(units, min(n, count - 1))], rows[row_of(units, min(n + 1, count - 1))]
        for o in range(0, size, PAIRED):
            if o % line == 0:
                ask(next_low, follows_at + o)
                ask(next_high, follows_at + o)
            to = place + o * LANES + pair * LANES
            store_paired(pairs, to, to + TILE, low, high, at + o)
