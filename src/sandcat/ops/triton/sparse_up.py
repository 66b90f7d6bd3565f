"""CUDA kernel of `sandcat::sparse_up` for one token: a program loads its neurons' activations, and the rows of up of
those that are kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sandcat.ops.sparse_up import check_arguments, reference, sparse_up
from sandcat.ops.triton.primitives.blocks import finish, widen
from sandcat.ops.triton.primitives.launch import code_of, codes
from sandcat.ops.weights import Stored

OPS = ("sparse_up",)


@triton.jit
def up_kernel(
    x, a, up, threshold, up_bias, up_scale, u, I, H, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """u = up(x) of the neurons that are kept by |a|, 0 of others."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a_n = tl.load(a + rows, mask=rows < I, other=0.0).to(tl.float32)
    t = tl.load(threshold + rows, mask=rows < I, other=0.0).to(tl.float32)
    wanted = (rows < I) & ~(tl.abs(a_n) <= t)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = up + rows.to(tl.int64)[:, None] * H + k[None, :]
        here = wanted[:, None] & (k < H)[None, :]
        w = tl.load(at, mask=here, other=0.0, eviction_policy="evict_first")
        total += widen(w, FORMAT) * tl.load(x + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
    s = finish(tl.sum(total, 1), up_scale, up_bias, rows, I)
    tl.store(u + rows, tl.where(wanted, s, 0.0).to(u.dtype.element_ty), mask=rows < I)


@sparse_up.register_kernel("cuda")
def launch(x_TH: Tensor, a_TI: Tensor, up: Stored, threshold_I: Tensor) -> Tensor:
    """The op on a GPU; see ops/sparse_up.py. Several tokens are the reference's."""
    check_arguments(x_TH, a_TI, up, threshold_I)
    if len(x_TH) > 1:
        return reference(x_TH, a_TI, up, threshold_I)
    tensors = [t if t is None else t.contiguous() for t in (x_TH, a_TI, codes(up), threshold_I, up.bias, up.scale)]
    (I, H), u_TI = up.codes.shape, torch.empty_like(a_TI, memory_format=torch.contiguous_format)
    config = {"FORMAT": code_of(up.format), "ROWS": 4, "BLOCK": 1024 // up.codes.element_size(), "num_warps": 4}
    with torch.cuda.device(x_TH.device):
        up_kernel[(triton.cdiv(I, 4),)](*tensors, u_TI, I, H, **config)
    return u_TI
