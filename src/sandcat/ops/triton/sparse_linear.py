"""CUDA kernel of `sandcat::sparse_linear` for one token, and of the sparse layers of a fused step.

`sparse_rows` cuts the columns of a weight into tiles and its channels into splits; channels are dealt out to the splits
sixteen at a time, so that busy regions of x are shared. A program compares its split of x with the thresholds, writes
the list of what it keeps, and reads the rows of that list. Sums are float32 and are added in a fixed order by the last
of a tile's programs, so two runs give the same bits; that one also adds the bias, and in a step the residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.sparse_linear import check_arguments, reference, sparse_linear
from sandcat.ops.triton.launch import dependent_launch, multiprocessors
from sandcat.ops.triton.pieces import activated, finish, gated, keep_neurons, which_of_three, widen

OPS = INT8_OPS = ("sparse_linear",)

MOST_SQUARES = tl.constexpr(1024)
"""Most partial sums of squares that a kernel may leave for the norm of the next one."""


@triton.jit
def _split_of_x(x, gate, norm, norm_i, eps, squares, n_squares, i, K, CODE: tl.constexpr, PAD: tl.constexpr):
    """Some elements of a layer's input: of x; of act(gate) * x; or of x after an RMSNorm, whose sum of squares either
    the kernels before have left in parts or is found here. Rounded as transformers rounds it."""
    x_i = tl.load(x + i, mask=i < K, other=0.0).to(tl.float32)
    if gate is not None:
        x_i = gated(tl.load(gate + i, mask=i < K, other=0.0).to(tl.float32), x_i, x.dtype.element_ty, CODE)
    if norm is not None:
        if squares is not None:
            j = tl.arange(0, MOST_SQUARES)
            square = tl.sum(tl.load(squares + j, mask=j < n_squares, other=0.0))
        else:
            k = tl.arange(0, PAD)
            x_k = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            square = tl.sum(x_k * x_k)
        dtype: tl.constexpr = norm.dtype.element_ty
        x_i = (x_i * tl.rsqrt(square / K + eps)).to(dtype).to(tl.float32)
        x_i = (x_i * norm_i).to(dtype).to(tl.float32)
    return x_i


@triton.jit
def sparse_rows(
    x, gate, norm, eps, squares, n_squares, a, b, c, a_threshold, b_threshold, c_threshold, a_bias, b_bias, c_bias,
    a_scale, b_scale, c_scale, list_i, list_x, parts, arrived, y, h, count, neurons, list_n, a_n, x_normed, position,
    A, B, C, K, CODE: tl.constexpr, PAD: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to three matrices of K channels, and A, B and C columns, with the kept channels of one input.

    The results go one of three ways: one after another into y; added to h, whose sums of squares it leaves in squares;
    or, as a gate with the thresholds `neurons`, into the list of neurons that `up_down_kernel` walks. With `position`
    see `project`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    w, size, cols, before = which_of_three(tile, a, b, c, A, B, C, BLOCK)
    threshold = which_of_three(tile, a_threshold, b_threshold, c_threshold, A, B, C, BLOCK)[0]
    e, r = tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    i = (e // 16 * SPLITS + split) * 16 + e % 16
    t = tl.load(threshold + i, mask=i < K, other=0.0).to(tl.float32)
    norm_i = t
    if norm is not None:
        norm_i = tl.load(norm + i, mask=i < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x_i = _split_of_x(x, gate, norm, norm_i, eps, squares, n_squares, i, K, CODE, PAD)
    if x_normed is not None:
        tl.store(x_normed + i, x_i.to(x_normed.dtype.element_ty), mask=(i < K) & (tile == 0))
    keep = (i < K) & ~(tl.abs(x_i) <= t)
    place = tl.cumsum(keep.to(tl.int32)) - 1
    n = tl.sum(keep.to(tl.int32))
    own = (split * tl.num_programs(0) + tile) * CHANNELS
    tl.store(list_i + own + place, i, mask=keep)
    tl.store(list_x + own + place, x_i, mask=keep)
    tl.debug_barrier()
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, n, ROWS, num_stages=STAGES):
        here = start + r < n
        row = tl.load(list_i + own + start + r, mask=here, other=0).to(tl.int64)
        x_r = tl.load(list_x + own + start + r, mask=here, other=0.0)
        at = w + row[:, None] * size + cols[None, :]
        w_rc = tl.load(at, mask=here[:, None] & (cols < size)[None, :], other=0, eviction_policy="evict_first")
        acc += widen(w_rc) * x_r[:, None]
    if PDL:
        gdc_launch_dependents()  # not before: programs that wait take from these the room to read ahead
    total = tl.sum(acc, 0)
    last = True
    if SPLITS > 1:
        columns = A + B + C
        tl.store(parts + split * columns + before + cols, total, mask=cols < size)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            s = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None]
            at = parts + s * columns + before + cols[None, :]
            mask = (s < SPLITS) & (cols < size)[None, :]
            total = tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
            tl.store(arrived + tile, 0)
        if a_scale is not None:
            a_scale = which_of_three(tile, a_scale, b_scale, c_scale, A, B, C, BLOCK)[0]
        if a_bias is not None:
            a_bias = which_of_three(tile, a_bias, b_bias, c_bias, A, B, C, BLOCK)[0]
        total = finish(total, a_scale, a_bias, cols, size)
        if h is not None:
            total += tl.load(h + cols, mask=cols < size, other=0.0)
            tl.store(h + cols, total, mask=cols < size)
            tl.store(squares + tile, tl.sum(tl.where(cols < size, total * total, 0.0)))
        elif neurons is not None:
            dtype: tl.constexpr = x_normed.dtype.element_ty
            keep_neurons(list_n, a_n, count, cols, activated(total, dtype, CODE), neurons, size)
        else:
            tl.store(y + before + cols, total.to(y.dtype.element_ty), mask=cols < size)
    if h is not None and count is not None:
        tl.store(count, 0, mask=(tile == 0) & (split == 0))
    if position is not None:
        tl.store(position, tl.load(position) + 1, mask=(tile == 0) & (split == 0))


def sparse_rows_config(columns: list[int], channels: int, itemsize: int, multiprocessors: int) -> tuple[dict, tuple]:
    """Shape of a program of `sparse_rows`, and the grid: tiles of columns and splits of channels.

    Splits are chosen so that all programs run at once and leave few places empty.
    """
    rows, block = (32, 256) if itemsize == 1 else (8, 1024 // itemsize)
    tiles = sum(triton.cdiv(size, block) for size in columns)
    places = max((2, 3), key=lambda each: each * multiprocessors // tiles * tiles / each)
    splits = max(1, min(places * multiprocessors // tiles, triton.cdiv(channels, 16)))
    config = {
        "PAD": triton.next_power_of_2(channels),
        "CHANNELS": triton.next_power_of_2(triton.cdiv(triton.cdiv(channels, 16), splits) * 16),
        "ROWS": rows,
        "BLOCK": block,
        "SPLITS": splits,
        "STAGES": 4,
        "num_warps": 4,
    }
    return config, (tiles, splits)


@sparse_linear.register_kernel("cuda")
def launch(
    x_TI: Tensor,
    weight_IO: Tensor,
    threshold_I: Tensor,
    bias_O: Tensor | None = None,
    scale_O: Tensor | None = None,
) -> Tensor:
    check_arguments(x_TI, weight_IO, threshold_I, bias_O, scale_O)
    if len(x_TI) > 1:
        return reference(x_TI, weight_IO, threshold_I, bias_O, scale_O)
    x, weight, threshold = x_TI.contiguous(), weight_IO.contiguous(), threshold_I.contiguous()
    bias, scale = (None if t is None else t.contiguous() for t in (bias_O, scale_O))
    I, O = weight.shape
    config, (tiles, splits) = sparse_rows_config([O], I, weight.element_size(), multiprocessors(x.device))
    room = tiles * splits * config["CHANNELS"]
    list_i = torch.empty(room, dtype=torch.int32, device=x.device)
    list_x = torch.empty(room, dtype=torch.float32, device=x.device)
    parts = torch.empty(splits * O, dtype=torch.float32, device=x.device)
    arrived = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    y_TO = torch.empty(1, O, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        sparse_rows[(tiles, splits)](
            x, None, None, 0.0, None, 0, *[weight] * 3, *[threshold] * 3, *[bias] * 3, *[scale] * 3, list_i, list_x,
            parts, arrived, y_TO, None, None, None, None, None, None, None, O, 0, 0, I, CODE=0, **config,
            **dependent_launch(x.device),
        )  # fmt: skip
    return y_TO
