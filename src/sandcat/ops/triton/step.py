"""CUDA kernels of a whole decode step; `sandcat.decoding.step` strings them together. `embed`, `normalize`,
`gate_times_up` and `attend` take any number of sequences, the others one.

Shapes: H hidden size, I intermediate size, D size of a head, G query heads a key-value head, L positions of the cache.
The residual state h is float32 and stays one buffer through all layers: norms are applied where it is read, and results
are added to it where they are made. Sums that several programs add to are float32 too, and are zeroed by a kernel that
runs between their last use and their next. Every kernel is launched while the one before it runs and waits where it
needs its results; weights, which no step changes, are asked for before that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.triton.primitives.blocks import clear_share, finish, gated, load_rows, which_of_three
from sandcat.ops.triton.primitives.pages import angles_of
from sandcat.ops.triton.primitives.rotary import turned


@triton.jit
def load_x(x, gate, norm, eps, k, K, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """A vector of K numbers: x, act(gate) * x, or x after an RMSNorm, rounded as transformers rounds it."""
    x_k = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if gate is not None:
        g_k = tl.load(gate + k, mask=k < K, other=0.0).to(tl.float32)
        x_k = gated(g_k, x_k.to(DTYPE).to(tl.float32), DTYPE, CODE)
    if norm is not None:
        x_k = normed(x_k, norm, eps, k, K)
    return x_k


@triton.jit
def normed(x_k, norm, eps, k, K):
    """A vector of K numbers after an RMSNorm, rounded as transformers rounds it."""
    dtype: tl.constexpr = norm.dtype.element_ty
    x_k = (x_k * tl.rsqrt(tl.sum(x_k * x_k) / K + eps)).to(dtype).to(tl.float32)
    return (x_k * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def embed(ids, ids_stride, table, h, row_stride, stride, H, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """h = the rows of the tokens. A table that is the head too, and skips inputs there, is stored by columns."""
    if PDL:
        gdc_wait()  # before the next kernel may start: that one reads weights, which must be written by now
        gdc_launch_dependents()
    k, t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    row = tl.load(ids + t * ids_stride).to(tl.int64)
    h_k = tl.load(table + row * row_stride + k.to(tl.int64) * stride, mask=k < H, other=0.0).to(tl.float32)
    tl.store(h + t * H + k, h_k, mask=k < H)


@triton.jit
def normalize(
    h, due, norm, eps, y, zeros, position, H, ZEROS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """h += what is due, if anything is; a row of y = that of h after an RMSNorm. For `zeros` see `clear_share`;
    `position` as in `project`, each row's own."""
    t, k = tl.program_id(0), tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    h_k = tl.load(h + t * H + k, mask=k < H, other=0.0)
    if due is not None:
        h_k += tl.load(due + t * H + k, mask=k < H, other=0.0).to(tl.float32)
        tl.store(h + t * H + k, h_k, mask=k < H)
    tl.store(y + t * H + k, normed(h_k, norm, eps, k, H).to(y.dtype.element_ty), mask=k < H)
    clear_share(zeros, ZEROS)
    if position is not None:
        tl.store(position + t, tl.load(position + t) + 1)


@triton.jit
def gate_times_up(gate, up, y, gate_stride, up_stride, I, CODE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A row of y = act(gate) * up."""
    t, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = y.dtype.element_ty
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    g = tl.load(gate + t * gate_stride + i, mask=i < I, other=0.0).to(dtype).to(tl.float32)
    u = tl.load(up + t * up_stride + i, mask=i < I, other=0.0).to(dtype).to(tl.float32)
    tl.store(y + t * I + i, gated(g, u, dtype, CODE).to(dtype), mask=i < I)


@triton.jit
def project(
    h, norm, eps, weights, biases, sizes, y, position, H, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """y = the products of up to three matrices, of so many rows, with the normed h, one after another.

    With `position`, the last kernel of a step: the position goes on by one.
    """
    k = tl.arange(0, BLOCK)
    tiles = tl.cdiv(sizes[0], ROWS) + tl.cdiv(sizes[1], ROWS) + tl.cdiv(sizes[2], ROWS)
    at, size, rows, before = which_of_three(tl.program_id(0), weights, sizes, ROWS)
    w = load_rows(at, rows, size, k, H)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_k = load_x(h, None, norm, eps, k, H, 0, norm.dtype.element_ty)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at, size_ahead, rows_ahead, before_ahead = which_of_three(tile + tl.num_programs(0), weights, sizes, ROWS)
        w_ahead = load_rows(at, rows_ahead, size_ahead, k, H)
        bias = None
        if biases[0] is not None:
            bias = which_of_three(tile, biases, sizes, ROWS)[0]
        total = finish(tl.sum(w.to(tl.float32) * x_k[None, :], 1), None, bias, rows, size)
        tl.store(y + before + rows, total.to(y.dtype.element_ty), mask=rows < size)
        w, size, rows, before = w_ahead, size_ahead, rows_ahead, before_ahead
    if position is not None:
        tl.store(position, tl.load(position) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def add_rows(
    x, gate, w, bias, h, zeros, N, K,
    CODE: tl.constexpr, DTYPE: tl.constexpr, ZEROS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h += W x, W of N rows and K columns, x or act(gate) * x in DTYPE; for `zeros` see `clear_share`."""
    k, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    w_rk = load_rows(w, tl.program_id(0) * ROWS + r, N, k, K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_k = load_x(x, gate, None, 0.0, k, K, CODE, DTYPE)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + r
        ahead = load_rows(w, rows + tl.num_programs(0) * ROWS, N, k, K)
        h_r = tl.load(h + rows, mask=rows < N, other=0.0)
        total = finish(tl.sum(w_rk.to(tl.float32) * x_k[None, :], 1), None, bias, rows, N)
        tl.store(h + rows, h_r + total, mask=rows < N)
        w_rk = ahead
    clear_share(zeros, ZEROS)


@triton.jit
def gate_up(
    h, norm, eps, gate, up, gate_bias, up_bias, y, I, H,
    CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = act(gate(x)) * up(x) of a dense MLP, x the normed h."""
    k, r = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    dtype: tl.constexpr = y.dtype.element_ty
    w_gate = load_rows(gate, tl.program_id(0) * ROWS + r, I, k, H)
    w_up = load_rows(up, tl.program_id(0) * ROWS + r, I, k, H)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_k = load_x(h, None, norm, eps, k, H, 0, dtype)
    for tile in range(tl.program_id(0), tl.cdiv(I, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + r
        ahead = rows + tl.num_programs(0) * ROWS
        gate_ahead, up_ahead = load_rows(gate, ahead, I, k, H), load_rows(up, ahead, I, k, H)
        g = finish(tl.sum(w_gate.to(tl.float32) * x_k[None, :], 1), None, gate_bias, rows, I)
        u = finish(tl.sum(w_up.to(tl.float32) * x_k[None, :], 1), None, up_bias, rows, I)
        tl.store(y + rows, gated(g, u.to(dtype).to(tl.float32), dtype, CODE).to(dtype), mask=rows < I)
        w_gate, w_up = gate_ahead, up_ahead


@triton.jit
def attend(
    q, q_row, new, turn, keys, values, scale, room, out, L, N, G, D, WINDOW,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Turns q and the `New` k, writes k and v into the cache, and attends to it. A sequence has N key-value heads, and
    a row of q, of k and of v.

    A program takes every SPLITS-th run of POSITIONS cached positions for one key-value head of one sequence; the last
    of a head's programs to end adds up their parts. Without `out` they stay parts, for `sparse_rows` to add up what it
    needs. WINDOW: how many positions are seen, the new one among them; all where it is None.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    g, d = tl.arange(0, GROUP), tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = keys.dtype.element_ty
    base = head.to(tl.int64) * L * D
    keys += base
    values += base
    q += head // N * q_row + head % N * (G * D)
    k = new.k + head // N * new.k_row + head % N * D
    v = new.v + head // N * new.v_row + head % N * D
    own = tl.load(turn.position)  # this and what is cached were written long before
    run, step = tl.arange(0, POSITIONS)[:, None], SPLITS * POSITIONS
    first = split * POSITIONS
    if WINDOW is not None:
        first += tl.maximum(0, own + 1 - WINDOW)
    t = first + run
    # what lies beyond the new position is read too, so that nothing waits for that
    k_sd = tl.load(keys + t * D + d, mask=(t < L) & (d < D), other=0.0)
    v_sd = tl.load(values + t * D + d, mask=(t < L) & (d < D), other=0.0)
    cos_d, sin_d = angles_of(own, turn, d, D)
    v_sd = tl.where(t < own, v_sd, 0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = (head * G + g)[:, None]
    here = (g < G)[:, None] & (d < D)
    q_gd = turned(q + g[:, None] * D, cos_d, sin_d, turn.q_norm, turn.eps, here, d, D, dtype)
    k_d = turned(k, cos_d, sin_d, turn.k_norm, turn.eps, d < D, d, D, dtype)
    v_d = tl.load(v + d, mask=d < D, other=0.0).to(dtype)
    if split == 0:
        tl.store(keys + own * D + d, k_d, mask=d < D)
        tl.store(values + own * D + d, v_d, mask=d < D)
    score = tl.sum(q_gd.to(tl.float32) * k_d.to(tl.float32), 1) * scale
    top = tl.where(split == 0, score, float("-inf"))  # the new position belongs to the first part
    total = tl.where(split == 0, tl.full((GROUP,), 1.0, tl.float32), 0.0)
    acc = tl.where(split == 0, tl.zeros((GROUP, BLOCK), tl.float32) + v_d.to(tl.float32), 0.0)
    for start in range(first, own, step):
        ahead = start + step + run
        k_ahead = tl.load(keys + ahead * D + d, mask=(ahead < own) & (d < D), other=0.0)
        v_ahead = tl.load(values + ahead * D + d, mask=(ahead < own) & (d < D), other=0.0)
        score_gs = tl.dot(q_gd, tl.trans(k_sd), input_precision="ieee") * scale
        score_gs = tl.where(tl.trans(start + run) < own, score_gs, float("-inf"))
        higher = tl.maximum(top, tl.max(score_gs, 1))
        p = tl.exp(score_gs - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(dtype), v_sd, input_precision="ieee")
        top = higher
        k_sd, v_sd = k_ahead, v_ahead
    part_g = (head * G + g) * SPLITS
    tl.store(room.top + part_g + split, top, mask=g < G)
    tl.store(room.sum + part_g + split, total, mask=g < G)
    tl.store(room.acc + (row * SPLITS + split) * D + d, acc, mask=here)
    if out is not None:
        tl.debug_barrier()
        if tl.atomic_add(room.arrived + head, 1, sem="acq_rel") == SPLITS - 1:
            highest = tl.full((GROUP,), float("-inf"), tl.float32)
            for p in tl.static_range(SPLITS):
                top = tl.load(room.top + part_g + p, mask=g < G, other=0.0, cache_modifier=".cg")
                highest = tl.maximum(highest, top)
            acc, total = tl.zeros((GROUP, BLOCK), tl.float32), tl.zeros((GROUP,), tl.float32)
            for p in tl.static_range(SPLITS):
                fade = tl.exp(tl.load(room.top + part_g + p, mask=g < G, other=0.0, cache_modifier=".cg") - highest)
                total += fade * tl.load(room.sum + part_g + p, mask=g < G, other=1.0, cache_modifier=".cg")
                at = room.acc + (row * SPLITS + p) * D + d
                acc += fade[:, None] * tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
            tl.store(out + row * D + d, (acc / total[:, None]).to(out.dtype.element_ty), mask=here)
            tl.store(room.arrived + head, 0)


def attend_splits(heads: int, length: int, multiprocessors: int) -> int:
    """Parts that the positions of each of so many key-value heads are taken in: one program a multiprocessor, or two
    where each still has 120 positions; a power of two up to 32."""
    splits = 1
    while splits < 32 and 2 * splits * heads <= multiprocessors * (2 if length >= 240 * splits else 1):
        splits *= 2
    return splits


def attend_config(group: int, size: int, itemsize: int, length: int, splits: int, crowded: bool) -> dict:
    """Query heads, padded for the tensor cores, and elements of a head; positions at a time; warps, fewer where a
    multiprocessor has more than one program and so is `crowded`."""
    block = max(16, triton.next_power_of_2(size))
    positions = min(128, 32768 // (block * itemsize**2), triton.next_power_of_2(triton.cdiv(length, 2 * splits)))
    return {
        "GROUP": max(16, triton.next_power_of_2(group)),
        "BLOCK": block,
        "POSITIONS": max(16, positions),
        "SPLITS": splits,
        "num_warps": 4 if crowded and itemsize < 4 else 8,
    }


def normalize_config(size: int) -> dict:
    """Columns that a program of `normalize` takes (all), and its warps."""
    return {"BLOCK": triton.next_power_of_2(size), "num_warps": 8}


def whole_rows_config(columns: int, itemsize: int, matrices: int = 1) -> dict:
    """Rows that a program takes at a time of each matrix, its columns (all), its warps, programs a multiprocessor."""
    block = triton.next_power_of_2(columns)
    rows = max(1, min(4, 8192 // block // matrices))
    warps = min(32, max(2, rows * matrices * block * itemsize // 4096))  # at most 64 numbers a thread
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps, "per_multiprocessor": 4}
