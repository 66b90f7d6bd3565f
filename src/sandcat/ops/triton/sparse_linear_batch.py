"""CUDA kernels of `sandcat::sparse_linear` and `sandcat::shared_linear` for several tokens.

`list_channels` lists, split by split, the channels that any token keeps, or that all share, with what the tokens have
there. `listed_rows` reads those rows of the weights, once for all tokens, a tile of columns and a split of the channels
a program, and multiplies them in the matrix unit; programs add their float32 sums to y as they end. Shapes: T tokens,
at most `TOKENS`; K channels, dealt out to the splits a group at a time; n places of a list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.shared_units import GROUP, LEAST_THRESHOLD
from sandcat.ops.triton.primitives.arguments import Zeros, three, three_sizes
from sandcat.ops.triton.primitives.blocks import as_dtype, clear_share, gated, which_of_three
from sandcat.ops.triton.primitives.launch import code_of, codes, dependent_launch, multiprocessors
from sandcat.ops.weights import Stored

TOKENS = 16
"""Tokens are padded to this for the matrix unit."""
LEAST = tl.constexpr(LEAST_THRESHOLD)


@triton.jit
def first_of_groups(total_u, kept_u, here_u, T, UNITS: tl.constexpr, GROUP: tl.constexpr):
    """Which units all tokens use, from the sums of their scores, and by how many tokens each is kept; see
    `sandcat.ops.shared_units.shared_units`. UNITS are whole groups."""
    total_u = tl.where(total_u == total_u, total_u, float("inf"))
    total_gu = tl.reshape(tl.where(here_u, total_u, -1.0), (UNITS // GROUP, GROUP))
    kept_g = tl.sum(tl.reshape(kept_u, (UNITS // GROUP, GROUP)), 1)
    count_g = (2 * kept_g + T - 1 + kept_g // T % 2) // (2 * T)
    own, other, u = total_gu[:, :, None], total_gu[:, None, :], tl.arange(0, GROUP)
    first = (other > own) | ((other == own) & (u[None, None, :] < u[None, :, None]))
    place_gu = tl.sum(first.to(tl.int32), 2)
    return tl.reshape((place_gu < count_g[:, None]).to(tl.int32), (UNITS,)) != 0


@triton.jit
def _of_token(x, gate, i, here, dtype: tl.constexpr, CODE: tl.constexpr):
    """Some elements of one token's x, or act(gate) * x, rounded as transformers rounds it."""
    x_i = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
    if gate is not None:
        g_i = tl.load(gate + i, mask=here, other=0.0).to(tl.float32)
        x_i = gated(g_i, x_i.to(dtype).to(tl.float32), dtype, CODE)
    return x_i


@triton.jit
def list_channels(
    x, x_stride, gate, thresholds, list_n, x_tn, count, room, zeros, T, K,
    CODE: tl.constexpr, SHARED: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    ZEROS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The list of a split's channels, by the thresholds of one of three matrices, and what the tokens have there, of x
    or of act(gate) * x.

    Every list has `CHANNELS` places of `room`; `count` says how many are taken. For `zeros` see `clear_share`.
    """
    split, matrix = tl.program_id(0), tl.program_id(1)
    threshold = thresholds[0]
    if matrix == 1:
        threshold = thresholds[1]
    elif matrix == 2:
        threshold = thresholds[2]
    dtype: tl.constexpr = threshold.dtype.element_ty
    e = tl.arange(0, CHANNELS)
    i = (e // GROUP * tl.num_programs(0) + split) * GROUP + e % GROUP
    limit = tl.load(threshold + i, mask=i < K, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(limit, LEAST)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total, kept = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.int32)
    for t in tl.static_range(TOKENS):
        here = (i < K) & (t < T)
        size = tl.abs(_of_token(x + t * x_stride, None if gate is None else gate + t * x_stride, i, here, dtype, CODE))
        kept += (here & ~(size <= limit)).to(tl.int32)
        if SHARED:
            total += (size * inverse) * (size * inverse)
    wanted = kept > 0
    if SHARED:
        wanted = first_of_groups(total, kept, i < K, T, CHANNELS, GROUP)
    own = matrix * tl.num_programs(0) + split
    place = own * CHANNELS + tl.cumsum(wanted.to(tl.int32)) - 1
    tl.store(list_n + place, i, mask=wanted)
    for t in tl.static_range(TOKENS):
        here = (i < K) & (t < T)
        x_i = _of_token(x + t * x_stride, None if gate is None else gate + t * x_stride, i, here, dtype, CODE)
        if not SHARED:
            x_i = tl.where(tl.abs(x_i) <= limit, 0.0, x_i)
        tl.store(x_tn + t * room + place, x_i.to(dtype), mask=wanted)
    tl.store(count + own, tl.sum(wanted.to(tl.int32)))
    clear_share(zeros, ZEROS)


@triton.jit
def listed_rows(
    list_n, x_tn, count, room, weights, biases, scales, sizes, y, y_stride, T,
    FORMAT: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y += the products of up to three matrices, of so many columns, one after another, with what the lists hold."""
    tile, split = tl.program_id(0), tl.program_id(1)
    w, size, cols, before = which_of_three(tile, weights, sizes, BLOCK)
    none = split * 0
    matrix = which_of_three(tile, (none, none + 1, none + 2), sizes, BLOCK)[0]
    own = matrix * SPLITS + split
    r, t = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    list_n += own * CHANNELS
    x_tn += own * CHANNELS
    if PDL:
        gdc_wait()
    n = tl.load(count + own)
    acc = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in tl.range(0, n, ROWS, num_stages=STAGES):
        here = start + r < n
        row = tl.load(list_n + start + r, mask=here, other=0).to(tl.int64)
        x_tr = tl.load(x_tn + t[:, None] * room + (start + r)[None, :], mask=here[None, :], other=0.0)
        at = w + row[:, None] * size + cols[None, :]
        w_rc = tl.load(at, mask=here[:, None] & (cols < size)[None, :], other=0.0, eviction_policy="evict_first")
        acc = tl.dot(x_tr, as_dtype(w_rc, x_tr.dtype, FORMAT), acc, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    if scales[0] is not None:
        scale = which_of_three(tile, scales, sizes, BLOCK)[0]
        acc *= tl.load(scale + cols, mask=cols < size, other=0.0).to(tl.float32)[None, :]
    if biases[0] is not None:
        bias = which_of_three(tile, biases, sizes, BLOCK)[0]
        acc += tl.load(bias + cols, mask=(cols < size) & (split == 0), other=0.0).to(tl.float32)[None, :]
    out = y + t.to(tl.int64)[:, None] * y_stride + (before + cols)[None, :]
    tl.atomic_add(out, acc, mask=(t < T)[:, None] & (cols < size)[None, :], sem="relaxed")


def listed_rows_config(
    columns: list[int], channels: int, x_itemsize: int, multiprocessors: int,
    *, programs: int = 4, rows: int = 16, block: int = 512, stages: int = 1, warps: int = 4,
) -> tuple[dict, tuple[int, int]]:  # fmt: skip
    """Shape of a program of `listed_rows`, and the grid: tiles of columns and splits of channels.

    Splits are chosen so that all programs run at once, and have the same number of groups. What a multiprocessor takes
    is measured (docs/performance.md).
    """
    block = block // 4 if x_itemsize == 4 else block  # products of float32 need the registers
    tiles, groups = sum(triton.cdiv(size, block) for size in columns), triton.cdiv(channels, GROUP)
    each = triton.cdiv(groups, max(1, programs * multiprocessors // tiles))
    config = {
        "CHANNELS": triton.next_power_of_2(each) * GROUP,
        "SPLITS": triton.cdiv(groups, each),
        "TOKENS": TOKENS,
        "ROWS": rows,
        "BLOCK": block,
        "STAGES": stages,
        "num_warps": warps,
    }
    return config, (tiles, config["SPLITS"])


def list_channels_config(channels: int, tokens: int) -> dict:
    """Channels of a program and of a group, tokens, and warps."""
    padded = triton.next_power_of_2(tokens)
    return {"CHANNELS": channels, "GROUP": GROUP, "TOKENS": padded, "num_warps": max(4, min(16, channels // 32))}


def add_channels(x_TI: Tensor, weight: Stored, threshold_I: Tensor, *, shared: bool) -> Tensor:
    """The product with the channels that any token keeps, or that all share; float32 [T, O]."""
    x, rows, threshold = x_TI.contiguous(), codes(weight).t().contiguous(), threshold_I.contiguous()
    bias, scale = (None if t is None else t.contiguous() for t in (weight.bias, weight.scale))
    (I, O), T, device = rows.shape, len(x), x.device
    config, (tiles, splits) = listed_rows_config([O], I, x.element_size(), multiprocessors(device))
    room, dependent = splits * config["CHANNELS"], dependent_launch(device)
    list_n = torch.empty(room, dtype=torch.int32, device=device)
    count = torch.empty(splits, dtype=torch.int32, device=device)
    x_tn = torch.empty(TOKENS, room, dtype=x.dtype, device=device)
    y_TO = torch.empty(T, O, dtype=torch.float32, device=device)
    with torch.cuda.device(device):
        list_channels[(splits, 1)](
            x, I, None, three([threshold]), list_n, x_tn, count, room, Zeros(y_TO, T * O), T, I, CODE=0,
            SHARED=shared, ZEROS=triton.next_power_of_2(triton.cdiv(T * O, splits)),
            **list_channels_config(config["CHANNELS"], T), **dependent,
        )  # fmt: skip
        listed_rows[(tiles, splits)](
            list_n, x_tn, count, room, three([rows]), three([bias]), three([scale]), three_sizes([O]), y_TO, O, T,
            FORMAT=code_of(weight.format), **config, **dependent,
        )  # fmt: skip
    return y_TO
