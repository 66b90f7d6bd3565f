"""Compiles the Triton kernels that read pages as compile_triton.py does others.

python tests/ops/compile_paged.py [compute capability, default 90]
"""

import sys

import torch
from compile_triton import NONE, resources, source_of

import sandcat.ops.triton.paged_attention as paged
from sandcat.ops.triton.primitives.page_grid import attend_config
from sandcat.ops.triton.primitives.pages import Cached, New, Room, Turn


def source(dtype: str, config: dict, *, new: bool, turn: bool, shifts: bool, chunks: bool, window: bool, pdl: bool):
    """`attend` for these arguments; addresses, and how far pages, tokens and heads lie apart, are multiples of 16."""
    x, n = f"*{dtype}", "i32"
    by_chunks, shift, angles = "*i64" if chunks else NONE, "*i32" if shifts else NONE, x if turn else NONE
    types = {
        "q": x, "out": x, "first": "*i32",
        "cached": Cached(x, x, by_chunks, by_chunks, "*i32", shift, "*i32", "*i32", *[n] * 16),
        "turn": Turn("*i32" if turn else NONE, angles, angles, NONE, NONE, "fp32"),
        "new": New(x, x, n, n) if new else New(NONE, NONE, n, n), "room": Room("*fp32", "*fp32", "*fp32", "*i32"),
        "q_row": n, "scaling": "fp32", "cap": "fp32" if window else NONE, "items": n, "WINDOW": n if window else NONE,
    }  # fmt: skip
    return source_of(paged.attend, types, config | {"N": 8, "P": 64, "ITEMS": 64, "PDL": pdl})


def main(capability: int) -> None:
    for dtype, most, page, options in (
        ("bf16", 1, 64, ["turn", "new"]), ("bf16", 1, 16, ["turn", "new", "window"]), ("bf16", 8, 64, ["turn", "new"]),
        ("bf16", 1, 64, ["turn", "shifts", "chunks"]), ("fp32", 1, 64, ["turn", "new"]),
    ):  # fmt: skip
        config = attend_config(most, 4, 128, page, 4 if dtype == "fp32" else 2, "shifts" in options)
        warps, _ = config.pop("num_warps"), config.pop("per_multiprocessor")
        flags = {name: name in options for name in ("new", "turn", "shifts", "chunks", "window")}
        built = source(dtype, config | {"G": 4, "D": 128, "S": page}, **flags, pdl=capability >= 90)
        registers, stack = resources(built, capability, {"num_warps": warps})
        print(f"attend {dtype} {most} rows {options} {warps} warps: {registers} registers, stack {stack}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
