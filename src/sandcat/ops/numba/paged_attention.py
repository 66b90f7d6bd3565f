"""CPU kernel of `sandcat::paged_attention`. Shapes: see ops/paged_attention.py; G query heads a key-value head.

What is to be read of all sequences and heads is laid end to end, and each thread takes an equal part of that, whatever
the lengths. What a thread has of a head are parts of its sums, and a second call joins them.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from sandcat.ops.numba.primitives.attention import fade_and_add, rotate, scale_scores, score_keys, weigh_scores
from sandcat.ops.numba.primitives.dtypes import STORAGE, exp, narrow, widen
from sandcat.ops.numba.primitives.memory import float32s, numbers, piece, pointer, record
from sandcat.ops.numba.primitives.registers import apart
from sandcat.ops.numba.primitives.threads import VERSION, on_all_threads, threads_of
from sandcat.ops.paged_attention import Pages, Rows, check_arguments, check_pages, paged_attention

ROWS = 8
"""Rows of a sequence that look at keys together."""
POSITIONS = 256
"""Keys that these look at before the next ones, so that they stay in the cache."""

POOL = record("chunks page token head")
"""Addresses of the pool's chunks, and how many numbers pages, tokens and heads lie apart there."""
JOB = record(
    "q out first start length table table_b table_n table_m shift position cos sin partial B H N D P S M R L items "
    "window itemsize",
    "scaling cap",
    keys=POOL, values=POOL,
)  # fmt: skip
"""Addresses of the arguments, 0 for what is None, and sizes. `partial` [items + threads, ROWS * G, D + 2]: of each
thread's parts the weighted values, the maximum and the sum."""
ITEM = np.dtype([(name, np.int64) for name in ("b", "n", "row", "rows", "own", "first", "end", "before")])
"""Rows of one sequence and the keys that one key-value head has for them: the first row and how many, the index of the
first row's own key, the keys' first and last index (past the end), and how many pairs of row and key come before."""


@njit
def list_items(job, items):
    """Fills the list of items; how many pairs of row and key there are."""
    firsts = carray(pointer(job.first), (job.B + 1,), np.int32)
    starts = carray(pointer(job.start), (job.B, job.N), np.int32)
    lengths = carray(pointer(job.length), (job.B, job.N), np.int32)
    count = total = 0
    for b in range(job.B):
        for row in range(firsts[b], firsts[b + 1], ROWS):
            for n in range(job.N):
                item = items[count]
                item.b, item.n, item.row, item.rows = b, n, row, min(ROWS, firsts[b + 1] - row)
                item.own = lengths[b, n] - (firsts[b + 1] - row)
                item.first = max(starts[b, n], item.own + 1 - job.window)
                item.end = max(item.first, item.own + item.rows)
                item.before = total
                total += (item.end - item.first) * item.rows
                count += 1
    return total


@njit
def part_of(item, first, end):
    """The keys of an item that belong to a thread's share of all pairs, from `first` to `end`."""
    low, high = max(0, first - item.before) // item.rows, max(0, end - item.before) // item.rows
    return min(item.end, item.first + low), min(item.end, item.first + high)


@njit
def address_of(job, pool, item, index):
    """Where a head's numbers of a token lie in keys or in values."""
    table = carray(pointer(job.table), (2**31,), np.int32)
    page = table[item.b * job.table_b + item.n * job.table_n + index // job.S * job.table_m]
    place = page % job.P * pool.page + index % job.S * pool.token + item.n * pool.head
    return carray(pointer(pool.chunks), (2**31,), np.int64)[page // job.P] + place * job.itemsize


@njit
def _list_runs(job, item, first, end, runs):
    """Lists runs of keys that lie in one page: addresses of keys and values, first index, end, shift; how many."""
    shifts = carray(pointer(job.shift), (job.B, job.N, job.M), np.int32)
    count, index = 0, first
    while index < end:
        entry, slot = index // job.S, index % job.S
        runs[count, 0] = address_of(job, job.keys, item, index)
        runs[count, 1] = address_of(job, job.values, item, index)
        runs[count, 2] = index
        index = min(end, index + job.S - slot)
        runs[count, 3] = index
        runs[count, 4] = shifts[item.b, item.n, entry] if job.shift else 0
        count += 1
    return count


@njit
def _turn(job, item, shift, q, like):
    """q = the item's rows, for keys that are moved on by `shift`."""
    D, G = job.D, job.H // job.N
    rows = numbers(job.q, (job.R, job.H, D), like)
    positions = carray(pointer(job.position), (job.R,), np.int32)
    cos, sin = numbers(job.cos, (job.L, D), like), numbers(job.sin, (job.L, D), like)
    for r in range(item.rows):
        for g in range(G):
            x, to = rows[item.row + r, item.n * G + g], q[r * G + g]
            for d in range(D):
                to[d] = widen(x[d])
            if job.cos:
                turn = positions[item.row + r] - shift
                rotate(to, cos[turn], sin[turn])


@njit
def _look(job, item, runs, count, first, weights, q, shift, like):
    """weights[r * G + g] = the scores of the keys from `first` on that row r sees; the shift that q is turned by."""
    apart()
    D, G = job.D, job.H // job.N
    for i in range(count):
        address, index, end = runs[i, 0], runs[i, 2], runs[i, 3]
        if runs[i, 4] != shift:
            shift = runs[i, 4]
            _turn(job, item, shift, q, like)
        keys = numbers(address, (end - index, job.keys.token), like)
        for r in range(item.rows):
            low, high = max(index, item.own + r + 1 - job.window), min(end, item.own + r + 1)
            if low < high:
                seen = keys[low - index : high - index]
                for g in range(r * G, r * G + G):
                    score_keys(piece(q, g, 0, D), seen, piece(weights, g, low - first, high - first))
    return shift


@njit
def _weigh(job, item, runs, count, first, end, weights, results, like):
    """Adds the values of the keys from `first` to `end`, weighted, to the rows' results."""
    apart()
    D, G = job.D, job.H // job.N
    for r in range(item.rows):
        low, high = max(first, item.own + r + 1 - job.window), min(end, item.own + r + 1)
        if low >= high:
            continue
        for g in range(r * G, r * G + G):
            acc, here = results[g], piece(weights, g, low - first, high - first)
            if job.cap > 0:
                _cap(here, np.float32(job.scaling / job.cap))
            top, total = acc[D], acc[D + 1]
            acc[D] = scale_scores(here, np.float32(job.cap if job.cap > 0 else job.scaling), top)
            fade = np.float32(math.exp(top - acc[D]))
            acc[D + 1] = total * fade + weigh_scores(here, acc[D])
            for i in range(count):
                index, to = max(runs[i, 2], low), min(runs[i, 3], high)
                if index < to:
                    values = numbers(runs[i, 1], (runs[i, 3] - runs[i, 2], job.values.token), like)
                    values = values[index - runs[i, 2] : to - runs[i, 2]]
                    fade_and_add(piece(results, g, 0, D), fade, here[index - low : to - low], values)
                    fade = np.float32(1)


@njit
def _cap(scores, scaling):
    """tanh of the scaled scores."""
    for p in range(scores.size):
        scores[p] = np.float32(1) - np.float32(2) / (exp(np.float32(2) * scaling * scores[p]) + np.float32(1))


@njit
def attend_part(job, item, first, end, runs, q, weights, results, like):
    """results [ROWS * G, D + 2] = what the item's rows have of the keys from `first` to `end`, q turned for shift 0."""
    for at in range(item.rows * (job.H // job.N)):
        for d in range(job.D + 2):
            results[at, d] = 0
        results[at, job.D] = -np.inf
    shift = 0
    for at in range(first, end, POSITIONS):
        to = min(end, at + POSITIONS)
        count = _list_runs(job, item, at, to, runs)
        shift = _look(job, item, runs, count, at, weights, q, shift, like)
        _weigh(job, item, runs, count, at, to, weights, results, like)


@njit
def _first_thread(pair, total, threads):
    """The thread whose share a pair belongs to."""
    thread = 0
    while total * (thread + 1) // threads <= pair:
        thread += 1
    return thread


@njit
def join(parts, first, end, at, sums):
    """sums [D] = a row and head's result, from the parts of its keys from `first` to `end`."""
    D, top, total = sums.size, np.float32(-np.inf), np.float32(0)
    for d in range(D):
        sums[d] = 0
    for part in range(first, end):
        top = max(top, parts[part, at, D])
    for part in range(first, end):
        weight = np.float32(math.exp(parts[part, at, D] - top)) if top > -np.inf else np.float32(0)
        total += weight * parts[part, at, D + 1]
        for d in range(D):
            sums[d] += weight * parts[part, at, d]
    for d in range(D):
        sums[d] = sums[d] / total if total > 0 else np.float32(0)


@njit
def attend_share(job, thread, threads, items, like):
    """What a thread has to do: the parts of its share of all pairs."""
    total, G = list_items(job, items), job.H // job.N
    first, end = total * thread // threads, total * (thread + 1) // threads
    results = float32s(job.partial, (job.items + threads, ROWS * G, job.D + 2))
    q, weights = np.empty((ROWS * G, job.D), np.float32), np.empty((ROWS * G, POSITIONS), np.float32)
    runs = np.empty((POSITIONS, 5), np.int64)
    for i in range(job.items):
        item = items[i]
        pairs = (item.end - item.first) * item.rows
        if item.before < end and item.before + pairs > first:
            low, high = part_of(item, first, end)
            if low < high:
                _turn(job, item, 0, q, like)
            attend_part(job, item, low, high, runs, q, weights, results[i + thread], like)


@njit
def join_share(job, thread, threads, items, like):
    """And after all threads are done with that: its share of the rows, joined from all parts of their keys."""
    total, G = list_items(job, items), job.H // job.N
    results = float32s(job.partial, (job.items + threads, ROWS * G, job.D + 2))
    out, sums = numbers(job.out, (job.R, job.H, job.D), like), np.empty(job.D, np.float32)
    for i in range(job.items * thread // threads, job.items * (thread + 1) // threads):
        item = items[i]
        pairs, first, end = (item.end - item.first) * item.rows, i, i
        if pairs:
            first += _first_thread(item.before, total, threads)
            end += _first_thread(item.before + pairs - 1, total, threads) + 1
        for at in range(item.rows * G):
            join(results, first, end, at, sums)
            to = out[item.row + at // G, item.n * G + at % G]
            for d in range(job.D):
                to[d] = narrow(sums[d], like[0])


@cache
def _kernels(dtype: torch.dtype):
    """The kernels for a dtype, one for the parts and one that joins them, compiled on first use (and then cached on
    disk). Called with the address of a `JOB` and the `VERSION`, both on as many threads."""
    storage, version = STORAGE[dtype], VERSION

    def attend(args, thread, threads):
        if args[1] != version:  # never: it ties the code that Numba caches to all sources it was made from
            return
        job = carray(pointer(args[0]), (1,), JOB)[0]
        attend_share(job, thread, threads, np.zeros(job.items, ITEM), np.zeros(1, storage))

    def join(args, thread, threads):
        if args[1] != version:
            return
        job = carray(pointer(args[0]), (1,), JOB)[0]
        join_share(job, thread, threads, np.zeros(job.items, ITEM), np.zeros(1, storage))

    return on_all_threads(attend), on_all_threads(join)


def fill_pages(job: np.void, pages: Pages, scaling: float, window: int | None, cap: float | None) -> list:
    """Writes all of a `JOB` but what belongs to rows; what it names by address, to be kept."""
    (P, S, N, D), (B, _, M) = pages.keys[0].shape, pages.table_BNM.shape
    held: list = [pages, *(np.array([chunk.data_ptr() for chunk in pool], np.int64) for pool in pages[:2])]
    for pool, chunks, addresses in zip(("keys", "values"), pages[:2], held[1:], strict=True):
        job[pool]["chunks"] = addresses.ctypes.data
        job[pool]["page"], job[pool]["token"], job[pool]["head"] = chunks[0].stride()[:3]
    fields = {
        "B": B, "N": N, "D": D, "P": P, "S": S, "M": M, "window": window or 2**31, "scaling": scaling, "cap": cap or 0,
        "itemsize": pages.keys[0].itemsize, "table": pages.table_BNM.data_ptr(),
    }  # fmt: skip
    fields |= dict(zip(("table_b", "table_n", "table_m"), pages.table_BNM.stride(), strict=True))
    for name, value in fields.items():
        job[name] = value
    return held


@paged_attention.register_kernel("cpu")
def _(q_RHD: Tensor, pages: Pages, rows: Rows, scaling: float, window: int | None, cap: float | None) -> Tensor:
    check_arguments("paged_attention", q_RHD, pages, rows)
    check_pages("paged_attention", pages)
    (R, H, D), N, threads = q_RHD.shape, pages.table_BNM.shape[1], threads_of()
    items = N * int((rows.first_B.diff() + (ROWS - 1)).div(ROWS, rounding_mode="floor").sum())
    job, out_RHD = np.zeros(1, JOB), torch.empty(q_RHD.shape, dtype=q_RHD.dtype)
    held = fill_pages(job[0], pages, scaling, window, cap)
    tensors = {
        "q": q_RHD, "out": out_RHD, "first": rows.first_B, "start": pages.start_BN, "length": pages.length_BN,
        "shift": pages.shift_BNM, "position": rows.position_R, "cos": rows.cos_LD, "sin": rows.sin_LD,
        "partial": torch.empty(items + threads, ROWS * (H // N), D + 2),
    }  # fmt: skip
    for name, tensor in tensors.items():
        held.append(None if tensor is None else tensor.contiguous())
        job[0][name] = 0 if tensor is None else held[-1].data_ptr()
    for name, size in {"H": H, "R": R, "L": 0 if rows.cos_LD is None else len(rows.cos_LD), "items": items}.items():
        job[0][name] = size
    for kernel in _kernels(q_RHD.dtype):
        kernel([job.ctypes.data, VERSION], threads)
    del held  # which was read by address
    return out_RHD
