"""CUDA kernel of `sandcat::sparse_linear` for one token, and of the sparse layers of a fused step of one sequence.

`sparse_rows` cuts the columns of a weight into tiles and its channels into splits; channels are dealt out to the splits
sixteen at a time, so that busy regions of x are shared. A program compares its split of x with the thresholds, writes
the list of what it keeps, and reads the rows of that list: a thread sixteen bytes of each, so that its sums never
leave it. Sums are float32; of int8 weights they are exact, of fixed-point digits (fixed_point.py); of e4m3 weights and
a bfloat16 x, four products at a time are added up as float16, within 2^-12 of them. Programs add their sums to y as
they end, so two runs may differ in the last bits; under `torch.use_deterministic_algorithms` the last of a
tile's programs adds them up in a fixed order. Several tokens: sparse_linear_batch.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.sparse_linear import check_arguments, reference, sparse_linear
from sandcat.ops.triton.primitives.arguments import Heads, Lists, Neurons, Source, Zeros, three, three_sizes
from sandcat.ops.triton.primitives.blocks import (
    FP8,
    INT8,
    PTX,
    activated,
    clear,
    clear_share,
    finish,
    keep_neurons,
    which_of_three,
)
from sandcat.ops.triton.primitives.kept_rows import add_four, list_words, split_of_x, word_sums
from sandcat.ops.triton.primitives.launch import code_of, codes, dependent_launch, multiprocessors
from sandcat.ops.triton.sparse_linear_batch import add_channels
from sandcat.ops.weights import Stored

OPS = ("sparse_linear",)


@triton.jit
def sparse_rows(
    source, heads, weights, thresholds, biases, scales, sizes, lists, y, zeros, neurons, x_taken, position, K,
    FORMAT: tl.constexpr, CODE: tl.constexpr, ADD: tl.constexpr, ORDERED: tl.constexpr, HEAD_PARTS: tl.constexpr,
    ZEROS: tl.constexpr, PAD: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to three matrices of K channels, and of so many columns, with the kept channels of one input.

    The results go, one after another, into y (ORDERED; with ADD they are added to it), or are added to y (else). With
    `Neurons` they are a gate's, and go into the list that `up_down_kernel` walks (ORDERED). The input goes into
    x_taken, if there is one. For `zeros` see `clear_share`, for HEAD_PARTS `attended`, for `position` `project`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    w, size, cols, before = which_of_three(tile, weights, sizes, BLOCK)
    threshold = which_of_three(tile, thresholds, sizes, BLOCK)[0]
    dtype: tl.constexpr = threshold.dtype.element_ty
    e, r = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    i = (e // 16 * SPLITS + split) * 16 + e % 16
    t = tl.load(threshold + i, mask=i < K, other=0.0).to(tl.float32)
    norm_i = t
    if source.norm is not None:
        norm_i = tl.load(source.norm + i, mask=i < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x_i = split_of_x(source, norm_i, heads, i, K, dtype, CODE, PAD, HEAD_PARTS)
    if x_taken is not None:
        tl.store(x_taken + i, x_i.to(dtype), mask=(i < K) & (tile == 0))
    keep = (i < K) & ~(tl.abs(x_i) <= t)
    own = (split * tl.num_programs(0) + tile) * CHANNELS
    list_i, list_x = lists.channel + own, lists.factor + own
    by_words: tl.constexpr = FORMAT == INT8 or (
        FORMAT == FP8 and PTX and w.dtype.element_ty != tl.uint8 and dtype == tl.bfloat16
    )
    if by_words:
        n, back = list_words(list_i, list_x, i, x_i, keep, e, FORMAT)
        early: tl.constexpr = PDL and not ORDERED  # what was measured to gain (docs/performance.md)
        acc = word_sums(list_i, list_x, n, w, size, cols, FORMAT, ROWS, BLOCK, STAGES, early) * back
    else:
        place, n = tl.cumsum(keep.to(tl.int32)) - 1, tl.sum(keep.to(tl.int32))
        tl.store(list_i + place, i, mask=keep)
        tl.store(list_x + place, x_i, mask=keep)
        tl.debug_barrier()
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, n, ROWS, num_stages=STAGES):
            here = start + r < n
            row = tl.load(list_i + start + r, mask=here, other=0).to(tl.int64)
            x_r = tl.load(list_x + start + r, mask=here, other=0.0)
            at = w + row[:, None] * size + cols[None, :]
            w_rc = tl.load(at, mask=here[:, None] & (cols < size)[None, :], other=0.0, eviction_policy="evict_first")
            if FORMAT == FP8:
                acc = add_four(acc, w_rc, x_r, FORMAT, BLOCK)
            else:
                acc += tl.sum(w_rc.to(tl.float32) * x_r[:, None], 0)
    if PDL:
        gdc_launch_dependents()  # else not before: programs that wait take from these the room to read ahead
    clear_share(zeros, ZEROS)
    scale, bias = None, None
    if scales[0] is not None:
        scale = which_of_three(tile, scales, sizes, BLOCK)[0]
    if biases[0] is not None:
        bias = which_of_three(tile, biases, sizes, BLOCK)[0]
    if not ORDERED:
        acc = finish(acc, scale, None, cols, size)
        if biases[0] is not None:
            acc += tl.load(bias + cols, mask=(cols < size) & (split == 0), other=0.0).to(tl.float32)
        tl.atomic_add(y + before + cols, acc, mask=cols < size, sem="relaxed")
    else:
        columns = sizes[0] + sizes[1] + sizes[2]
        tl.store(lists.parts + split * columns + before + cols, acc, mask=cols < size)
        tl.debug_barrier()
        if tl.atomic_add(lists.arrived + tile, 1, sem="acq_rel") == SPLITS - 1:
            s, acc_s = tl.arange(0, 2 * ROWS), tl.zeros((2 * ROWS, BLOCK), tl.float32)
            for first in tl.range(0, SPLITS, 2 * ROWS, num_stages=4):
                here = (first + s < SPLITS)[:, None] & (cols < size)[None, :]
                part = lists.parts + (first + s)[:, None] * columns + (before + cols)[None, :]
                acc_s += tl.load(part, mask=here, other=0.0, cache_modifier=".cg")
            acc = tl.sum(acc_s, 0)
            tl.store(lists.arrived + tile, 0)
            acc = finish(acc, scale, bias, cols, size)
            if neurons.threshold is not None:
                keep_neurons(neurons, cols, activated(acc, dtype, CODE), size)
            else:
                if ADD:
                    acc += tl.load(y + before + cols, mask=cols < size, other=0.0)
                tl.store(y + before + cols, acc.to(y.dtype.element_ty), mask=cols < size)
    if position is not None:
        tl.store(position, tl.load(position) + 1, mask=(tile == 0) & (split == 0))


def sparse_rows_config(
    columns: list[int], channels: int, itemsize: int, multiprocessors: int, *, alone: bool = False
) -> tuple[dict, tuple]:
    """Shape of a program of `sparse_rows`, and the grid: tiles of columns and splits of channels.

    Splits are chosen so that all programs run at once. How many a multiprocessor has, and how many stages they read
    ahead, is measured (docs/performance.md): as a kernel of a step, or `alone`, after one that zeroes its sums.
    """
    warps = 4
    programs, stages = (2, 4) if alone or itemsize == 1 else (4, 3)
    block = warps * 32 * 16 // itemsize
    tiles = sum(triton.cdiv(size, block) for size in columns)
    splits = max(1, min(programs * multiprocessors // tiles, triton.cdiv(channels, 16)))
    config = {
        "PAD": triton.next_power_of_2(channels),
        "CHANNELS": triton.next_power_of_2(triton.cdiv(triton.cdiv(channels, 16), splits) * 16),
        "ROWS": 4,
        "BLOCK": block,
        "SPLITS": splits,
        "STAGES": stages,
        "num_warps": warps,
    }
    return config, (tiles, splits)


@sparse_linear.register_kernel("cuda")
def launch(x_TI: Tensor, weight: Stored, threshold_I: Tensor) -> Tensor:
    """The op on a GPU; see ops/sparse_linear.py."""
    check_arguments(x_TI, weight, threshold_I)
    if len(x_TI) > 1 and torch.are_deterministic_algorithms_enabled():
        return reference(x_TI, weight, threshold_I)
    if len(x_TI) > 1:
        return add_channels(x_TI, weight, threshold_I, shared=False)
    x, rows, threshold = x_TI.contiguous(), codes(weight).t().contiguous(), threshold_I.contiguous()
    bias, scale = (None if t is None else t.contiguous() for t in (weight.bias, weight.scale))
    I, O = rows.shape
    config, (tiles, splits) = sparse_rows_config([O], I, rows.element_size(), multiprocessors(x.device), alone=True)
    ordered, dependent = torch.are_deterministic_algorithms_enabled(), dependent_launch(x.device)
    room = tiles * splits * config["CHANNELS"]
    list_i = torch.empty(room, dtype=torch.int32, device=x.device)
    list_x = torch.empty(room, dtype=torch.float32, device=x.device)
    y_TO = torch.empty(1, O, dtype=torch.float32, device=x.device)
    parts = arrived = None
    if ordered:
        parts = torch.empty(splits * O, dtype=torch.float32, device=x.device)
        arrived = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.device):
        if not ordered:
            clear[(triton.cdiv(O, 1024),)](y_TO, None, O, BLOCK=1024, **dependent)
        sparse_rows[(tiles, splits)](
            Source(x), Heads(), three([rows]), three([threshold]), three([bias]), three([scale]), three_sizes([O]),
            Lists(list_i, list_x, parts, arrived), y_TO, Zeros(), Neurons(), None, None, I,
            FORMAT=code_of(weight.format), CODE=0, ADD=False, ORDERED=ordered, HEAD_PARTS=0, ZEROS=1, **config,
            **dependent,
        )  # fmt: skip
    return y_TO
