"""Rotary embedding of heads, after their RMSNorm where there is one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned(x, cos, sin, norm, eps, here, d, D, dtype: tl.constexpr):
    """Heads of q or k whose first elements are at x, normed and turned, in their dtype."""
    half = D // 2
    other = tl.where(d < half, d + half, d - half)
    own = tl.load(x + d, mask=here, other=0.0).to(dtype).to(tl.float32)
    swapped = tl.load(x + other, mask=here, other=0.0).to(dtype).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(own * own, 1) / D + eps)[:, None]
        own *= scale * tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)
        swapped *= scale * tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)
    return (own * cos + tl.where(d < half, -swapped, swapped) * sin).to(dtype)
