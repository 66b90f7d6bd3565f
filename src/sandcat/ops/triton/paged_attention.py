"""CUDA kernels of `sandcat::paged_attention` and `sandcat::paged_write`. Shapes: see ops/paged_attention.py; G query
heads a key-value head.

A fixed number of programs shares what is to be read, whatever the lengths: an item is some rows of one sequence and
what one key-value head has cached for them; items are laid end to end, and each program takes an equal part of the
whole. An item that several programs have parts of is added up by the last of them to end, in the order of the parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.paged_attention import Pages, Rows, check_arguments, paged_attention, paged_write
from sandcat.ops.triton.primitives.launch import multiprocessors
from sandcat.ops.triton.primitives.page_grid import cached_of, grid_of, room_of, scalings
from sandcat.ops.triton.primitives.pages import (
    LEAST,
    UNIT,
    New,
    Turn,
    angles_of,
    angles_of_rows,
    ask_for_keys,
    block_of,
    heads_at,
    joined,
    keys_of,
    places_of,
    quotient,
    span_of,
    units_of,
    weighed,
)  # fmt: skip
from sandcat.ops.triton.primitives.rotary import turned

OPS = ("paged_attention", "paged_write")


@triton.jit
def attend(
    q, out, first, cached, turn, new, room, q_row, scaling, cap, items, WINDOW,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, ITEMS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr, GATHER: tl.constexpr, NEWS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [R, N * G * D] = what the rows of q attend to.

    A row's q begins q_row numbers after the one before; `scaling` and `cap` as `scalings` gives them. WINDOW: how many
    keys a row sees, its own among them; all where it is None. Each of `items` items, ITEMS at most, is ROWS rows, of
    which a sequence has BLOCKS times as many at most, and one key-value head. With `new`, lengths are those before the
    rows, of which each sequence has NEWS and one item at most.
    """
    NEW: tl.constexpr = new.k is not None
    program = tl.program_id(0)
    if PDL and not NEW:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.arange(0, ITEMS)
    _, _, _, rows_i, _, low_i, high_i = span_of(i, i < items, first, cached, WINDOW, N, BLOCKS, ROWS, NEW)
    end_i = tl.cumsum(units_of(rows_i, low_i, high_i), 0)
    total_units = tl.max(end_i, 0)
    share = tl.maximum(tl.cdiv(total_units, tl.num_programs(0)), LEAST)
    mine = tl.minimum(program * share, total_units)
    mine_end = tl.minimum(mine + share, total_units)
    item = tl.sum((end_i <= mine).to(tl.int32), 0)
    before = tl.max(tl.where(end_i <= mine, end_i, 0), 0)
    m, h, d = tl.arange(0, GROUP), tl.arange(0, HEADS), tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = cached.k.dtype.element_ty
    here = item < items
    b, n, row, rows, own, low, high = span_of(item, here, first, cached, WINDOW, N, BLOCKS, ROWS, NEW)
    cos_md, sin_md = 0.0, 0.0
    if turn.cos is not None:
        cos_md, sin_md = angles_of_rows(row, rows, 0, turn, d, G, D, ROWS, GROUP)
    if PDL and NEW:  # what is cached was written long before, and can be on its way
        part_low = low + (mine - before) * UNIT
        ask_for_keys(
            part_low, tl.minimum(high, part_low + (mine_end - mine) * UNIT), b, n, cached, D, S, P, BLOCK, AHEAD
        )
        gdc_wait()
        gdc_launch_dependents()
    while before < mine_end:
        units = units_of(rows, low, high)
        if units > 0:
            part_low = low + tl.maximum(mine - before, 0) * UNIT
            part_high = tl.minimum(high, low + tl.minimum(units, mine_end - before) * UNIT)
            first_part, last_part = before // share, (before + units - 1) // share
            r, here_d = m // G, (m < rows * G)[:, None] & (d < D)
            at_q = heads_at(q, row, q_row, n, m, G, D)
            top = tl.full((GROUP,), float("-inf"), tl.float32)
            total, acc = tl.zeros((GROUP,), tl.float32), tl.zeros((GROUP, BLOCK), tl.float32)
            if NEW:
                is_last = before + units <= mine_end
                t = tl.arange(0, NEWS)
                here_t = (t < rows) & is_last
                here_td = here_t[:, None] & (d < D)
                at_k, at_v = heads_at(new.k, row, new.k_row, n, t, 1, D), heads_at(new.v, row, new.v_row, n, t, 1, D)
                v_td = tl.load(at_v + d, mask=here_td, other=0.0).to(dtype)
                position_t = tl.load(turn.position + row + t, mask=here_t, other=0)
                cos_td, sin_td = angles_of(position_t[:, None], turn, d, D)
                k_td = turned(at_k, cos_td, sin_td, turn.k_norm, turn.eps, here_td, d, D, dtype)
            if turn.cos is None:
                q_md = tl.load(at_q + d, mask=here_d, other=0.0).to(dtype)
            else:
                q_md = turned(at_q, cos_md, sin_md, turn.q_norm, turn.eps, here_d, d, D, dtype)
            if NEW:  # noqa: SIM102  # which alone decides what is compiled
                if is_last:
                    key_at, value_at = places_of(b, n, (own + t) // S, (own + t) % S, here_t, cached, P, False)
                    tl.store(cached.k + key_at[:, None] + d, k_td, mask=here_td)
                    tl.store(cached.v + value_at[:, None] + d, v_td, mask=here_td)
                    seen_mt = here_t[None, :] & (t[None, :] <= r[:, None])
                    if WINDOW is not None:
                        seen_mt &= t[None, :] > (r - WINDOW)[:, None]
                    top, total, acc = weighed(top, total, acc, q_md, k_td, v_td, seen_mt, scaling, cap)
            now = 0
            j, end_j = 0, tl.cdiv(part_high - part_low, POSITIONS)
            if not GATHER:
                j = block_of(part_low, S, POSITIONS)
                end_j = tl.where(part_high > part_low, block_of(part_high - 1, S, POSITIONS) + 1, j)
            for at in tl.range(j, end_j, num_stages=STAGES):
                index, seen, key_at, value_at, shift = keys_of(
                    at, part_low, part_high, b, n, cached, S, P, POSITIONS, GATHER
                )
                here_pd = seen[:, None] & (d < D)
                k_pd = tl.load(cached.k + key_at[:, None] + d, mask=here_pd, other=0.0)
                v_pd = tl.load(cached.v + value_at[:, None] + d, mask=here_pd, other=0.0)
                if cached.shift is not None:  # noqa: SIM102
                    if shift != now:
                        cos_s, sin_s = angles_of_rows(row, rows, shift, turn, d, G, D, ROWS, GROUP)
                        q_md = turned(at_q, cos_s, sin_s, turn.q_norm, turn.eps, here_d, d, D, dtype)
                        now = shift
                seen_mp = seen[None, :]
                if ROWS > 1:
                    seen_mp &= index[None, :] <= (own + r)[:, None]
                    if WINDOW is not None:
                        seen_mp &= index[None, :] > (own + r - WINDOW)[:, None]
                top, total, acc = weighed(top, total, acc, q_md, k_pd, v_pd, seen_mp, scaling, cap)
            if first_part == last_part:
                y_md = quotient(acc, total)
                tl.store(heads_at(out, row, N * G * D, n, m, G, D) + d, y_md.to(out.dtype.element_ty), mask=here_d)
            else:
                slot, here_m = (item + program) * HEADS + m, m < rows * G
                tl.store(room.top + slot, top, mask=here_m)
                tl.store(room.sum + slot, total, mask=here_m)
                tl.store(room.acc + slot[:, None] * D + d, acc, mask=here_d)
                tl.debug_barrier()
                if tl.atomic_add(room.arrived + item, 1, sem="acq_rel") == last_part - first_part:
                    y_hd = joined(room, item, first_part, last_part, rows * G, d, HEADS, BLOCK, D, PARTS)
                    here_hd = (h < rows * G)[:, None] & (d < D)
                    tl.store(heads_at(out, row, N * G * D, n, h, G, D) + d, y_hd.to(out.dtype.element_ty), mask=here_hd)
                    tl.store(room.arrived + item, 0)
        before += units
        item += 1
        if before < mine_end:
            b, n, row, rows, own, low, high = span_of(item, True, first, cached, WINDOW, N, BLOCKS, ROWS, NEW)
            if turn.cos is not None:
                cos_md, sin_md = angles_of_rows(row, rows, 0, turn, d, G, D, ROWS, GROUP)


@triton.jit
def write(
    k, v, first, cached, k_row, v_row, B,
    N: tl.constexpr, D: tl.constexpr, S: tl.constexpr, P: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes one row of k and v of one head into its page."""
    row, n, i, d = tl.program_id(0), tl.program_id(1), tl.arange(0, ITEMS), tl.arange(0, BLOCK)
    b = tl.sum((tl.load(first + 1 + i, mask=i < B, other=2**31 - 1) <= row).to(tl.int32), 0)
    if b < B:
        index = tl.load(cached.length + b * cached.length_b + n * cached.length_n) - (tl.load(first + b + 1) - row)
        key_at, value_at = places_of(b, n, index // S, index % S, True, cached, P, True)
        k_d = tl.load(k + row.to(tl.int64) * k_row + n * D + d, mask=d < D, other=0.0)
        v_d = tl.load(v + row.to(tl.int64) * v_row + n * D + d, mask=d < D, other=0.0)
        tl.store(cached.k + key_at + d, k_d, mask=d < D)
        tl.store(cached.v + value_at + d, v_d, mask=d < D)


@paged_attention.register_kernel("cuda")
def launch(q_RHD: Tensor, pages: Pages, rows: Rows, scaling: float, window: int | None, cap: float | None) -> Tensor:
    """The op on a GPU; see ops/paged_attention.py."""
    check_arguments("paged_attention", q_RHD, pages, rows)
    q_RHD, (_, H, D), device = q_RHD.contiguous(), q_RHD.shape, q_RHD.device
    out_RHD, grid = torch.empty_like(q_RHD), grid_of(H, rows.most, pages, multiprocessors(device))
    first_B, _, *turn = (t.contiguous() if isinstance(t, Tensor) else t for t in rows)
    with torch.cuda.device(device):
        attend[(grid.programs,)](
            q_RHD, out_RHD, first_B, cached_of(pages), Turn(*turn), New(), room_of(grid, device), H * D,
            *scalings(scaling, cap), grid.items, window, PDL=False, **grid.config,
        )  # fmt: skip
    return out_RHD


@paged_write.register_kernel("cuda")
def launch_write(k_RND: Tensor, v_RND: Tensor, pages: Pages, first_B: Tensor) -> None:
    """The op on a GPU; see ops/paged_attention.py."""
    for x_RND in (k_RND, v_RND):
        check_arguments("paged_write", x_RND, pages, Rows(first_B, len(k_RND)))
    (R, N, D), (P, S), B = k_RND.shape, pages.keys[0].shape[:2], len(pages.table_BNM)
    sizes = {"N": N, "D": D, "S": S, "P": P, "ITEMS": triton.next_power_of_2(B), "BLOCK": triton.next_power_of_2(D)}
    with torch.cuda.device(k_RND.device):
        write[(R, N)](
            k_RND.contiguous(), v_RND.contiguous(), first_B.contiguous(), cached_of(pages), N * D, N * D, B, **sizes,
            num_warps=1,
        )  # fmt: skip
