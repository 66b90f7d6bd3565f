"""How kernels that read pages are launched: what a program takes at a time, what programs share, and the arguments that
say where a pool's pages lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sandcat.ops.paged_attention import Pages
from sandcat.ops.triton.primitives.pages import Cached, Room


def scalings(scaling: float, cap: float | None) -> tuple[float, float | None]:
    """What `attend` multiplies products with, and the cap: exponentials are powers of 2 there."""
    log2_e = 1.4426950408889634
    return (scaling * log2_e, None) if cap is None else (2 * scaling / cap * log2_e, cap * log2_e)


class Grid(NamedTuple):
    """How `attend` is launched for so many sequences of one cache, whatever their lengths."""

    items: int
    programs: int
    config: dict[str, int | bool]


def attend_config(most: int, group: int, size: int, page: int, itemsize: int, shifts: bool) -> dict:
    """Rows and query heads that a program takes at a time, so many rows of a sequence at most; keys at a time, and
    whether they may lie in several pages; how a program runs, and how many do on a multiprocessor.

    Many small programs were the fastest on an H100, with as much on its way as few large ones.
    """
    rows = 1 if most == 1 else max(1, min(most, 64 // group))
    block, heads = max(16, triton.next_power_of_2(size)), triton.next_power_of_2(rows * group)
    small = heads <= 16 and itemsize < 4 and not shifts
    positions = max(16, min(128, (16384 if small else 32768) // (block * itemsize**2)))
    if shifts:
        positions = max(16, min(positions, triton.next_power_of_2(page)))
    return {
        "ROWS": rows, "BLOCKS": triton.cdiv(most, rows), "GROUP": max(16, heads), "HEADS": heads, "BLOCK": block,
        "POSITIONS": positions, "GATHER": not shifts and page % positions != 0,
        "NEWS": max(16, triton.next_power_of_2(rows)), "PARTS": max(1, min(16, 8192 // (heads * block))), "STAGES": 3,
        "AHEAD": 128, "num_warps": 2 if small else 8 if shifts else 4, "per_multiprocessor": 4 if small else 2,
    }  # fmt: skip


def grid_of(heads: int, most: int, pages: Pages, multiprocessors: int, **other: int) -> Grid:
    """The grid for so many query heads, and rows of a sequence at most; `other` is taken in place of what
    `attend_config` says."""
    (P, S, N, D), itemsize = pages.keys[0].shape, pages.keys[0].itemsize
    config = attend_config(most, heads // N, D, S, itemsize, pages.shift_BNM is not None) | other
    items = len(pages.table_BNM) * N * config["BLOCKS"]
    P = P if len(pages.keys) > 1 else 0  # of which no other kernel is compiled for another pool
    sizes = {"N": N, "G": heads // N, "D": D, "S": S, "P": P, "ITEMS": triton.next_power_of_2(items)}
    return Grid(items, config.pop("per_multiprocessor") * multiprocessors, sizes | config)


def room_of(grid: Grid, device: torch.device) -> Room:
    """What programs of one launch need; the launches of a step use it one after another."""
    parts = (grid.items + grid.programs) * grid.config["HEADS"]
    return Room(
        *(torch.empty(parts, device=device) for _ in range(2)), torch.empty(parts * grid.config["D"], device=device),
        torch.zeros(grid.items, dtype=torch.int32, device=device),
    )  # fmt: skip


def cached_of(pages: Pages) -> Cached:
    """What the kernels take, of a pool in one chunk or more.

    Raises:
        ValueError: chunks do not begin a multiple of 16 numbers apart.
    """
    chunks: list[Tensor | None] = [None, None]
    if len(pages.keys) > 1:
        chunks = [offsets_of(pool, pages.table_BNM.device) for pool in (pages.keys, pages.values)]
    return Cached(
        pages.keys[0], pages.values[0], *chunks, pages.table_BNM, pages.shift_BNM, pages.start_BN,
        pages.length_BN, *pages.keys[0].stride()[:3], *pages.values[0].stride()[:3],
        *pages.table_BNM.stride(), *((0, 0, 0) if pages.shift_BNM is None else pages.shift_BNM.stride()),
        *pages.start_BN.stride(), *pages.length_BN.stride(),
    )  # fmt: skip


def offsets_of(chunks: Sequence[Tensor], device: torch.device) -> Tensor:
    """How many numbers after the first each chunk begins.

    Raises:
        ValueError: one does not begin a multiple of 16 after.
    """
    offsets = [(chunk.data_ptr() - chunks[0].data_ptr()) // chunk.itemsize for chunk in chunks]
    if any(offset % 16 for offset in offsets):
        raise ValueError(f"chunks of pages must begin a multiple of 16 numbers apart, and these do so at {offsets}.")
    return torch.tensor(offsets, device=device)
