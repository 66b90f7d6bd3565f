"""CUDA kernels of `sandcat::sparse_mlp` and `sandcat::sparse_up_down`. Shapes: see ops/sparse_mlp.py. Of several tokens
the gate is a dense product; the rest is in sparse_mlp_batch.py.

`clear` zeroes the sums and the counter. `gate_kernel` computes a = act(gate(x)) for all neurons and appends the kept
ones to a list (`_list_kernel`: those of a given a); `up_down_kernel` walks the list, a few neurons at a time: up row .
x, times a, times the down row, summed in registers over all of a program's neurons, so that the intermediate state
never leaves the chip; one atomic add a program and column at the end.

The list and the sums are in the order in which programs come, so two runs may differ in the last bits. Under
`torch.use_deterministic_algorithms` they are not: the gate only marks what it keeps, `in_order` makes the list,
programs leave their sums, and `add_parts` adds those up.

Sums are float32; gate, up and their product are rounded to the model's dtype as the reference rounds them. From compute
capability 9.0 on, a kernel is launched while the one before it still runs (programmatic dependent launch) and waits
where it first needs its results.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.sparse_mlp import check_arguments, reference_up_down, sparse_mlp, sparse_up_down
from sandcat.ops.triton import stored_linear
from sandcat.ops.triton.primitives.arguments import Neurons, Source
from sandcat.ops.triton.primitives.blocks import CODES, activated, clear, finish, keep_neurons, load_rows, widen
from sandcat.ops.triton.primitives.launch import code_of, codes, dependent_launch, multiprocessors
from sandcat.ops.triton.sparse_mlp_batch import add_tokens
from sandcat.ops.weights import Stored

OPS = ("sparse_mlp", "sparse_up_down")


@triton.jit
def gate_kernel(
    source, gate, bias, gate_scale, neurons, x_normed, I, H,
    FORMAT: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The list of `Neurons` by a gate of `Source`. With a norm, x is normed first (which is a number that the sums are
    multiplied with), and kept in x_normed."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = gate + rows.to(tl.int64)[:, None] * H
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = (rows < I)[:, None] & (k < H)[None, :]
        w = tl.load(at + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        x_k = tl.load(source.x + k, mask=k < H, other=0.0).to(tl.float32)
        if source.norm is not None:
            square += x_k * x_k
            x_k *= tl.load(source.norm + k, mask=k < H, other=0.0).to(tl.float32)
        total += widen(w, FORMAT) * x_k[None, :]
    if PDL:
        gdc_launch_dependents()
    g = tl.sum(total, 1)
    if source.norm is not None:
        scale = tl.rsqrt(tl.sum(square) / H + source.eps)
        g *= scale
        if tl.program_id(0) == 0:
            for start in range(0, H, BLOCK):
                k = start + tl.arange(0, BLOCK)
                x_k = tl.load(source.x + k, mask=k < H, other=0.0).to(tl.float32) * scale
                x_k *= tl.load(source.norm + k, mask=k < H, other=0.0).to(tl.float32)
                tl.store(x_normed + k, x_k.to(x_normed.dtype.element_ty), mask=k < H)
    a = activated(finish(g, gate_scale, bias, rows, I), neurons.threshold.dtype.element_ty, CODE)
    keep_neurons(neurons, rows, a, I)


@triton.jit
def _list_kernel(a, neurons, I, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep_neurons(neurons, rows, tl.load(a + rows, mask=rows < I, other=0.0).to(tl.float32), I)


@triton.jit
def in_order(list_n, a_n, count, I, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Makes the list of neurons, in their order, in place of their marks. One program."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    kept = 0
    for start in range(0, I, BLOCK):
        n = start + tl.arange(0, BLOCK)
        wanted = tl.load(list_n + n, mask=n < I, other=0)
        a = tl.load(a_n + n, mask=n < I, other=0.0)
        place = kept + tl.cumsum(wanted) - 1
        tl.debug_barrier()  # places are never behind what is still to be read
        tl.store(list_n + place, n, mask=wanted == 1)
        tl.store(a_n + place, a, mask=wanted == 1)
        kept += tl.sum(wanted)
    tl.store(count, kept)


@triton.jit
def up_down_kernel(
    x, up, down, bias, up_scale, down_scale, count, list_n, a_n, y, I, H,
    UP: tl.constexpr, DOWN: tl.constexpr, NEURONS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y += up and down, stored as UP and DOWN, of the listed neurons; or, with PARTS, row p of y is the share of
    program p."""
    k = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    first, step = tl.program_id(0) * NEURONS, tl.num_programs(0) * NEURONS
    i = first + tl.arange(0, NEURONS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.load(count)
    row = tl.load(list_n + i, mask=i < n, other=I)
    row_ahead = tl.load(list_n + i + step, mask=i + step < n, other=I)
    w_up, w_down = load_rows(up, row, I, k, H), load_rows(down, row, I, k, H)
    x_k = tl.load(x + k, mask=k < H, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, n, step):
        i = start + tl.arange(0, NEURONS)
        up_ahead, down_ahead = load_rows(up, row_ahead, I, k, H), load_rows(down, row_ahead, I, k, H)
        row_next = row_ahead
        row_ahead = tl.load(list_n + i + 2 * step, mask=i + 2 * step < n, other=I)
        a = tl.load(a_n + i, mask=i < n, other=0.0)
        u = finish(tl.sum(widen(w_up, UP) * x_k.to(tl.float32)[None, :], 1), up_scale, bias, row, I)
        h = (a * u.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        total += tl.sum(h[:, None] * widen(w_down, DOWN), 0)
        row, w_up, w_down = row_next, up_ahead, down_ahead
    total = finish(total, down_scale, None, k, H)
    if PARTS:
        tl.store(y + tl.program_id(0) * H + k, total, mask=k < H)
    elif first < n:
        tl.atomic_add(y + k, total, mask=k < H, sem="relaxed")


@triton.jit
def add_parts(parts, y, P, H, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y += the sums of P programs, in their order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    k, r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        p = start + r
        acc += tl.load(parts + p[:, None] * H + k[None, :], mask=(p < P)[:, None] & (k < H)[None, :], other=0.0)
    total = tl.sum(acc, 0) + tl.load(y + k, mask=k < H, other=0.0)
    tl.store(y + k, total, mask=k < H)


def gate_config(itemsize: int) -> dict:
    """Rows and columns that a program of `gate_kernel` takes at a time, and its warps."""
    return {"ROWS": 16, "BLOCK": 512 // max(2, itemsize), "num_warps": 4}


def up_down_config(hidden: int, itemsize: int) -> dict:
    """Neurons that a program takes at a time, its columns (all), its warps, and programs a multiprocessor."""
    block = triton.next_power_of_2(hidden)
    at_once = 4096 if itemsize == 1 else 16384 // itemsize  # so that two programs have registers enough
    return {"NEURONS": max(1, min(4, at_once // block)), "BLOCK": block, "num_warps": 8, "per_multiprocessor": 2}


def parts_like(y_H: Tensor) -> Tensor | None:
    """Room for what the programs of `up_down_kernel` leave where sums have a fixed order; None where they have not."""
    if not torch.are_deterministic_algorithms_enabled():
        return None
    return y_H.new_empty(2 * multiprocessors(y_H.device), len(y_H), dtype=torch.float32)


def up_down(
    x: Tensor, up: Stored, down: Stored, count: Tensor, list_n: Tensor, a_n: Tensor, y: Tensor, parts: Tensor | None
) -> None:
    """y += up and down of the listed neurons, without down's bias; with `parts` they are only marked, and all is done
    in their order. up and down lie by neurons."""
    (I, H), dependent = up.codes.shape, dependent_launch(x.device)
    config = up_down_config(H, max(up.codes.element_size(), down.codes.element_size()))
    programs = multiprocessors(x.device) * config.pop("per_multiprocessor")
    if parts is not None:
        programs = len(parts)
        in_order[(1,)](list_n, a_n, count, I, BLOCK=8192, num_warps=32, **dependent)
    up_down_kernel[(programs,)](
        x, codes(up), codes(down).t(), up.bias, up.scale, down.scale, count, list_n, a_n, y if parts is None else parts,
        I, H, UP=code_of(up.format), DOWN=code_of(down.format), PARTS=parts is not None, **config, **dependent,
    )  # fmt: skip
    if parts is not None:
        add_parts[(triton.cdiv(H, 64),)](parts, y, programs, H, ROWS=32, BLOCK=64, **dependent)


@sparse_mlp.register_kernel("cuda")
def launch(x_TH: Tensor, gate: Stored, up: Stored, down: Stored, threshold_I: Tensor, activation: str) -> Tensor:
    """The op on a GPU; see ops/sparse_mlp.py."""
    (I, H), T = gate.codes.shape, len(x_TH)
    check_arguments("sparse_mlp", x_TH, gate, None, up, down, threshold_I)
    if T > 1:
        if gate.scale is None:
            g_TI = F.linear(x_TH, gate.codes, gate.bias)
        else:
            g_TI = stored_linear.launch(x_TH, gate).to(x_TH.dtype)
        return launch_up_down(x_TH, ACTIVATIONS[activation](g_TI), up, down, threshold_I)
    y_TH, count, list_n, a_n, parts = _room(x_TH, I)
    x, threshold = x_TH.contiguous(), threshold_I.contiguous()
    gate, up, down = _by_neurons(gate), _by_neurons(up), _by_neurons(down, is_down=True)
    dependent = dependent_launch(x.device)
    with torch.cuda.device(x.device):
        clear[(triton.cdiv(H, 1024),)](y_TH, count, H, BLOCK=1024, **dependent)
        config = gate_config(gate.codes.element_size())
        gate_kernel[(triton.cdiv(I, config["ROWS"]),)](
            Source(x), codes(gate), gate.bias, gate.scale,
            Neurons(threshold, list_n, a_n, count if parts is None else None), None, I, H,
            FORMAT=code_of(gate.format), CODE=CODES[activation], **config, **dependent,
        )  # fmt: skip
        up_down(x, up, down, count, list_n, a_n, y_TH[0], parts)
    return y_TH if down.bias is None else y_TH + down.bias


@sparse_up_down.register_kernel("cuda")
def launch_up_down(x_TH: Tensor, a_TI: Tensor, up: Stored, down: Stored, threshold_I: Tensor) -> Tensor:
    """The op on a GPU; see ops/sparse_mlp.py."""
    (I, H), T = up.codes.shape, len(x_TH)
    check_arguments("sparse_up_down", x_TH, None, a_TI, up, down, threshold_I)
    if T > 1 and torch.are_deterministic_algorithms_enabled():
        return reference_up_down(x_TH, a_TI, up, down, threshold_I)
    if T > 1:
        y_TH = add_tokens(x_TH, a_TI, up, down, threshold_I, shared=False)
        return y_TH if down.bias is None else y_TH + down.bias
    x, a, threshold = (t.contiguous() for t in (x_TH, a_TI, threshold_I))
    up, down = _by_neurons(up), _by_neurons(down, is_down=True)
    y_TH, count, list_n, a_n, parts = _room(x_TH, I)
    dependent = dependent_launch(x.device)
    with torch.cuda.device(x.device):
        clear[(triton.cdiv(H, 1024),)](y_TH, count, H, BLOCK=1024, **dependent)
        neurons = Neurons(threshold, list_n, a_n, count if parts is None else None)
        _list_kernel[(triton.cdiv(I, 1024),)](a, neurons, I, BLOCK=1024, **dependent)
        up_down(x, up, down, count, list_n, a_n, y_TH[0], parts)
    return y_TH if down.bias is None else y_TH + down.bias


def _room(x_TH: Tensor, neurons: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Memory for the sums, the counter and the list of neurons with their activations; and `parts_like` the sums."""
    device = x_TH.device
    y_TH = torch.empty(x_TH.shape, dtype=torch.float32, device=device)
    count, list_n = (torch.empty(size, dtype=torch.int32, device=device) for size in (1, neurons))
    return y_TH, count, list_n, torch.empty(neurons, dtype=torch.float32, device=device), parts_like(y_TH[0])


def _by_neurons(weight: Stored, *, is_down: bool = False) -> Stored:
    """A matrix whose neurons are rows of contiguous memory, as its vectors are contiguous too."""
    rows = weight.codes.t().contiguous().t() if is_down else weight.codes.contiguous()
    scale, bias = (None if t is None else t.contiguous() for t in (weight.scale, weight.bias))
    return weight._replace(codes=rows, scale=scale, bias=bias)
