"""Runs the Triton kernels that read pages on the CPU by Triton's interpreter and compares them with the references.

A program of its own, for the same reason as interpret_triton.py.
"""

import contextlib
import sys
from pathlib import Path

import interpreted  # noqa: F401  (before the kernels)
import torch

sys.path[:0] = [str(folder) for folder in (Path(__file__).parent, Path(__file__).parent.parent)]

from conftest import assert_close
from test_paged_attention import CASES, arguments, exact

import sandcat.ops.triton.paged_attention as paged
from sandcat.ops.paged_attention import reference, rotated, write_reference
from sandcat.ops.triton.primitives.page_grid import cached_of, grid_of, room_of, scalings
from sandcat.ops.triton.primitives.pages import New, Turn

empty, count = torch.empty, 0


def poisoned(*shape, **options):
    tensor = empty(*shape, **options)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**20)


torch.empty = poisoned
torch.cuda.device = lambda device: contextlib.nullcontext()


def check(found, want, dtype):
    global count
    assert_close(found, want, dtype)
    count += 1


def writing(args, k, v, norms, programs):
    """What `attend` makes of rows whose keys and values it writes itself; lengths are those before them."""
    q, pages, rows, scaling, window, cap = args
    grid = grid_of(q.shape[1], rows.most, pages, 1)._replace(programs=programs)
    before = pages._replace(length_BN=pages.length_BN - rows.first_B.diff()[:, None])
    out = torch.empty(*q.shape, dtype=q.dtype)
    paged.attend[(programs,)](
        q, out, rows.first_B, cached_of(before), Turn(*rows[2:], *norms, 1e-6), New(k, v, k.stride(0), v.stride(0)),
        room_of(grid, q.device), q.stride(0), *scalings(scaling, cap), grid.items, window, PDL=False, **grid.config,
    )  # fmt: skip
    return out


def normed(x, weight):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()


def copied(pages):
    """Pages with a memory of their own."""
    pools = ([chunk[:, :, : 1 if chunk.stride(2) == 0 else None].clone() for chunk in pool] for pool in pages[:2])
    N = pages.table_BNM.shape[1]
    keys, values = ([chunk.expand(-1, -1, N, -1) for chunk in pool] for pool in pools)
    return pages._replace(keys=keys, values=values)


def check_writing(dtype, programs, *, norms=False, **options):
    """Its results, and the pages that it leaves, are those of the references."""
    q, pages, rows, *rest = args = arguments(**options, dtype=dtype, turned=True)
    if pages.shift_BNM is not None:  # pages that are still written have none
        pages.shift_BNM[:, :, -3:] = 0
    k, v = (torch.randn(len(q), pages.table_BNM.shape[1], q.shape[2]).to(dtype) for _ in range(2))
    weights = [torch.rand(q.shape[2]).to(dtype) if norms else None for _ in range(2)]
    want, angles = copied(pages), [t[rows.position_R.long()][:, None].float() for t in rows[3:]]
    turned = rotated(normed(k, weights[1]) if norms else k.float(), *angles).to(dtype)
    write_reference(turned, v, want, rows.first_B)
    expected = reference(normed(q, weights[0]).to(dtype) if norms else q, want, rows, *rest)
    check(writing(args, k, v, weights, programs), expected, dtype)
    for found, pool in zip(pages[:2], want[:2], strict=True):
        check(torch.cat(found), torch.cat(pool), dtype)


for multiprocessors, dtype in ((1, torch.float32), (3, torch.float16)):
    paged.multiprocessors = lambda device, count=multiprocessors: count
    for case in CASES.values():
        args = arguments(**case, dtype=dtype)
        check(paged.launch(*args), exact(*args), dtype)
for layout in ("own", "token", "head"):
    _, pages, rows, *_ = arguments([40, 9, 90], [3, 0, 20], layout=layout, chunks=3, page=7)
    want, (k, v) = copied(pages), torch.randn(2, 25, 2, 64)
    write_reference(k, v, want, rows.first_B)
    paged.launch_write(k, v, pages, rows.first_B)
    for found, pool in zip(pages[:2], want[:2], strict=True):
        check(torch.cat(found), torch.cat(pool), torch.float32)
for programs, dtype in ((1, torch.float32), (7, torch.float16)):
    check_writing(dtype, programs, lengths=[300, 3, 41, 30], rows=[1, 1, 1, 1], starts=[0, 2, 17, 0])
    check_writing(dtype, programs, lengths=[1, 5], rows=[1, 1])
    check_writing(dtype, programs, lengths=[60, 33, 9, 100], rows=[3, 1, 0, 5], starts=[0, 9, 0, 64], norms=True)
    check_writing(dtype, programs, lengths=[200, 12, 70], rows=[1, 2, 5], window=33)
    check_writing(dtype, programs, lengths=[200, 12, 70], rows=[1, 2, 5], window=3, page=7)
    check_writing(dtype, programs, lengths=[90, 90], rows=[1, 3], shifts=True, page=8)
    check_writing(dtype, programs, lengths=[40, 90], rows=[1, 3], chunks=3, layout="token", cap=3.0)
print(f"{count} cases equal the reference")
