"""Attention over pages of cached keys and values. The ops `sandcat::paged_attention` and `sandcat::paged_write`.

Shapes: R rows (new tokens, several of which may belong to one sequence: verified drafts, a piece of a prompt), B
sequences, H query heads, N key-value heads, D size of a head; P pages in a chunk of the pool, S tokens a page, M
entries in a table; L positions of the rotary tables.

A table says for one sequence and key-value head which page holds its first S keys, which the next S, and so on. A key's
place in this order is its index; its position, which is what it was rotated by, may be another. Entries of what is not
seen may hold anything, and so may the pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sandcat.ops.op import Op

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Pages(NamedTuple):
    """What is cached of B sequences in one layer."""

    keys: Sequence[Tensor]
    """The pool's chunks, each [P, S, N, D], all of one shape and of the same strides, with elements of a head side by
    side. Page p lies in chunk p // P. Where a page belongs to one head alone, the heads' stride is 0."""
    values: Sequence[Tensor]
    table_BNM: Tensor
    """int32: numbers of pages. Of any strides; 0 where all heads have the same table."""
    start_BN: Tensor
    """int32: the index of the first key that is there (left padding and a freed window are not)."""
    length_BN: Tensor
    """int32: how many keys there are, counted from index 0 on, those of the rows among them."""
    shift_BNM: Tensor | None = None
    """int32: how many positions a page's keys are moved on by; those of rows are not. None: none is."""


class Rows(NamedTuple):
    """Which rows belong to which sequence, and how they are turned."""

    first_B: Tensor
    """int32, B + 1 of them: rows `first_B[b]` to `first_B[b + 1]` are the last tokens of sequence b, maybe none."""
    most: int
    """Rows of a sequence, at most."""
    position_R: Tensor | None = None
    """int32; None, as the next two: q comes turned."""
    cos_LD: Tensor | None = None
    sin_LD: Tensor | None = None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of heads, halves apart, rounded as transformers rounds it."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def reference(q_RHD: Tensor, pages: Pages, rows: Rows, scaling: float, window: int | None, cap: float | None) -> Tensor:
    """The definition: a row sees the keys up to its own, which has been written, `window` of them at most.

    Scores are q . k * scaling, and with a cap cap * tanh(score / cap). Where rows have positions q is turned by a row's
    position less the page's shift: keys stay as they are. A row that sees nothing gives 0.

    Returns [R, H, D] in the dtype of q.
    """
    keys, values, table_BNM, start_BN, length_BN, shift_BNM = pages
    (B, N, _), S, G = table_BNM.shape, keys[0].shape[1], q_RHD.shape[1] // table_BNM.shape[1]
    keys_PSND, values_PSND, out_RHD = torch.cat(list(keys)), torch.cat(list(values)), torch.zeros_like(q_RHD)
    for b, n in ((b, n) for b in range(B) for n in range(N)):
        own, heads = slice(*rows.first_B[b : b + 2].tolist()), slice(n * G, (n + 1) * G)
        index_T = torch.arange(int(length_BN[b, n]), device=q_RHD.device)[int(start_BN[b, n]) :]
        page_T, slot_T = table_BNM[b, n, index_T // S].long(), index_T % S
        q_RTGD = q_RHD[own, None, heads].expand(-1, len(index_T), -1, -1)
        if rows.position_R is not None and rows.cos_LD is not None and rows.sin_LD is not None:
            turn_RT = rows.position_R[own, None] - (0 if shift_BNM is None else shift_BNM[b, n, index_T // S])
            q_RTGD = rotated(q_RTGD, rows.cos_LD[turn_RT][:, :, None], rows.sin_LD[turn_RT][:, :, None])
        score_RGT = (q_RTGD.float() * keys_PSND[page_T, slot_T, n][:, None].float()).sum(-1).transpose(1, 2) * scaling
        score_RGT = score_RGT if cap is None else cap * (score_RGT / cap).tanh()
        last_R1T = torch.arange(own.start - own.stop, 0, device=q_RHD.device)[:, None, None] + int(length_BN[b, n])
        seen_R1T = (index_T <= last_R1T) & (index_T > last_R1T - (window or 2**31))
        p_RGT = score_RGT.masked_fill(~seen_R1T, -torch.inf).softmax(-1).masked_fill(~seen_R1T, 0)
        out_RHD[own, heads] = (p_RGT @ values_PSND[page_T, slot_T, n].float()).to(q_RHD.dtype)
    return out_RHD


paged_attention = Op("paged_attention", reference, gradients=False)
"""`reference`, by the kernel of the device where there is one."""


@paged_attention.register_fake
def _(q_RHD, pages, rows, scaling, window, cap):
    return torch.empty_like(q_RHD)


def write_reference(k_RND: Tensor, v_RND: Tensor, pages: Pages, first_B: Tensor) -> None:
    """Writes the rows' keys and values, turned before, where `paged_attention` expects them: those of the rows of a
    sequence (see `Rows`) are the last of its `length_BN`. Rows past those of the last sequence are left out."""
    (P, S), N = pages.keys[0].shape[:2], pages.table_BNM.shape[1]
    sequence_R = torch.repeat_interleave(first_B.diff().long())
    row_R = torch.arange(len(sequence_R), device=k_RND.device)
    index_RN = pages.length_BN[sequence_R].long() - (first_B[sequence_R + 1] - row_R)[:, None]
    page_RN = pages.table_BNM[sequence_R[:, None], torch.arange(N, device=k_RND.device), index_RN // S].long()
    for pool, new_RND in ((pages.keys, k_RND), (pages.values, v_RND)):
        for chunk, pages_PSND in enumerate(pool):
            r, n = (page_RN // P == chunk).nonzero(as_tuple=True)
            own = pages_PSND.stride(2) == 0  # and torch does not write what is expanded
            at = (page_RN[r, n] % P, index_RN[r, n] % S, 0 if own else n)
            pages_PSND[:, :, : 1 if own else N][at] = new_RND[r, n]


paged_write = Op("paged_write", write_reference, gradients=False, mutates=("pages_keys", "pages_values"))
"""`write_reference`, by the kernel of the device where there is one."""


@paged_write.register_fake
def _(k_RND, v_RND, pages, first_B):
    return None


def check_arguments(op: str, x_RHD: Tensor, pages: Pages, rows: Rows) -> None:
    """What a kernel reads by address must be there.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not go together.
    """
    keys, values, table_BNM, start_BN, length_BN, shift_BNM = pages
    first_B, _, position_R, cos_LD, sin_LD = rows
    (R, H, D), (B, N, M) = x_RHD.shape, table_BNM.shape
    chunk, L = (*keys[0].shape[:2], N, D), 0 if cos_LD is None else len(cos_LD)
    tensors = {f"keys[{i}]": (t, chunk, x_RHD.dtype) for i, t in enumerate(keys)}
    tensors |= {f"values[{i}]": (t, chunk, x_RHD.dtype) for i, t in enumerate(values)}
    tensors |= {
        "table": (table_BNM, (B, N, M), torch.int32), "start": (start_BN, (B, N), torch.int32),
        "length": (length_BN, (B, N), torch.int32), "first": (first_B, (B + 1,), torch.int32),
        "shift": (shift_BNM, (B, N, M), torch.int32), "position": (position_R, (R,), torch.int32),
        "cos": (cos_LD, (L, D), x_RHD.dtype), "sin": (sin_LD, (L, D), x_RHD.dtype),
    }  # fmt: skip
    for name, (tensor, shape, dtype) in tensors.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != x_RHD.device):
            raise ValueError(
                f"sandcat::{op}: {name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; with "
                f"{tuple(x_RHD.shape)} {x_RHD.dtype} on {x_RHD.device} it must be {tuple(shape)} {dtype}, there."
            )
    if x_RHD.dtype not in FLOATS or D % 2 or H % N or len(keys) != len(values):
        raise ValueError(
            f"sandcat::{op} takes {', '.join(map(str, FLOATS))}, heads of an even size, a number of them that "
            f"key-value heads divide, and as many chunks of keys as of values; got {x_RHD.dtype}, size {D}, {H} heads "
            f"for {N}, {len(keys)} and {len(values)} chunks."
        )
    for chunks in (keys, values):
        if any(t.stride() != chunks[0].stride() for t in chunks) or chunks[0].stride(-1) != 1:
            raise ValueError(
                f"sandcat::{op}: chunks must have the same strides, 1 in a head; got {[t.stride() for t in chunks]}."
            )
    if len({t is None for t in (position_R, cos_LD, sin_LD)}) > 1 or (shift_BNM is not None and cos_LD is None):
        raise ValueError(f"sandcat::{op}: a shift needs position, cos and sin, and these come together.")


def check_pages(op: str, pages: Pages) -> None:
    """So must the pages that the table names, and the table's entries. It asks the tensors for their numbers.

    Raises:
        IndexError: a length is beyond the table, or a page of what is seen beyond the pool.
    """
    keys, _, table_BNM, start_BN, length_BN, _ = pages
    count, S, M = sum(map(len, keys)), keys[0].shape[1], table_BNM.shape[2]
    entry_M = torch.arange(M) * S
    seen_BNM = (entry_M + S > start_BN[..., None]) & (entry_M < length_BN[..., None])
    strays = table_BNM[seen_BNM & ((table_BNM < 0) | (table_BNM >= count))]
    if len(strays) or bool((length_BN > M * S).any()) or bool((start_BN < 0).any()):
        raise IndexError(
            f"sandcat::{op}: pages {strays.tolist()}, starts {start_BN.tolist()}, lengths {length_BN.tolist()}; there "
            f"are {count} pages, and the tables hold {M} of {S} tokens each."
        )
