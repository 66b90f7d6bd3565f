"""CUDA kernel of the low-rank term of a product, in a fused step of one sequence. Shapes: K channels, R rank."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sandcat.ops.triton.primitives.blocks import load_rows


@triton.jit
def dropped_rows(
    x, threshold, w, y, R, K, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y = W x_dropped, W of R rows and K columns: of the channels that a product with x leaves out."""
    k, rows = tl.arange(0, BLOCK), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w_rk = load_rows(w, rows, R, k, K)
    limit_k = tl.load(threshold + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x_k = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    x_k = tl.where(tl.abs(x_k) <= limit_k, x_k, 0.0)
    total = tl.sum(w_rk.to(tl.float32) * x_k[None, :], 1)
    tl.store(y + rows, total.to(y.dtype.element_ty), mask=rows < R)
