"""Runs the Triton kernels that read pages on the CPU by Triton's interpreter and compares them with the references.

A program of its own, for the same reason as interpret_triton.py.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import sys
from pathlib import Path

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
    q, keys, first = args["q_RHD"], args["keys"], args["first_B"]
    R, H, D = q.shape
    grid = grid_of(H, args["most"], keys[0], args["table_BNM"], shifts="shift_BNM" in args, multiprocessors=1)
    before = args["length_BN"] - first.diff()[:, None]
    cached = cached_of(keys, args["values"], args["table_BNM"], args.get("shift_BNM"), args["start_BN"], before)
    turn, out = (
        Turn(args["position_R"], args["cos_LD"], args["sin_LD"], *norms, 1e-6),
        torch.empty(R, H, D, dtype=q.dtype),
    )
    grid = grid._replace(programs=programs)
    paged.attend[(programs,)](
        q, out, first, cached, turn, New(k, v, k.stride(0), v.stride(0)), room_of(grid, q.device), H * D,
        *scalings(args["scaling"], args.get("cap")), grid.items, args.get("window"), PDL=False, **grid.config,
    )  # fmt: skip
    return out


def normed(x, weight):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()


def check_writing(dtype, programs, *, norms=False, **options):
    """Its results, and the pages that it leaves, are those of the references."""
    args = arguments(**options, dtype=dtype, turned=True)
    (R, _, D), N = args["q_RHD"].shape, args["table_BNM"].shape[1]
    if "shift_BNM" in args:  # pages that are still written have none
        args["shift_BNM"][:, :, -3:] = 0
    k, v = (torch.randn(R, N, D).to(dtype) for _ in range(2))
    weights = [torch.rand(D).to(dtype) if norms else None for _ in range(2)]
    want = dict(args)
    for name in ("keys", "values"):
        want[name] = [chunk[:, :, : 1 if chunk.stride(2) == 0 else N].clone().expand_as(chunk) for chunk in args[name]]
    angles = [args[name][args["position_R"].long()][:, None].float() for name in ("cos_LD", "sin_LD")]
    turned = rotated(normed(k, weights[1]) if norms else k.float(), *angles).to(dtype)
    write_reference(turned, v, want["keys"], want["values"], args["table_BNM"], args["length_BN"], args["first_B"])
    want["q_RHD"] = normed(args["q_RHD"], weights[0]).to(dtype) if norms else args["q_RHD"]
    check(writing(args, k, v, weights, programs), reference(**want), dtype)
    for name in ("keys", "values"):
        check(torch.cat(args[name]), torch.cat(want[name]), dtype)


for multiprocessors, dtype in ((1, torch.float32), (3, torch.float16)):
    paged.multiprocessors = lambda device, count=multiprocessors: count
    for case in CASES.values():
        args = arguments(**case, dtype=dtype)
        check(paged.launch(**args), exact(args), dtype)
for layout in ("own", "token", "head"):
    args = arguments([40, 9, 90], [3, 0, 20], layout=layout, chunks=3, page=7)
    want = {name: [chunk[:, :, : 1 if layout == "own" else 2].clone().expand_as(chunk) for chunk in args[name]]
            for name in ("keys", "values")}  # fmt: skip
    rest, (k, v) = [args[name] for name in ("table_BNM", "length_BN", "first_B")], torch.randn(2, 25, 2, 64)
    write_reference(k, v, want["keys"], want["values"], *rest)
    paged.launch_write(k, v, args["keys"], args["values"], *rest)
    for name in ("keys", "values"):
        check(torch.cat(args[name]), torch.cat(want[name]), torch.float32)
for programs, dtype in ((1, torch.float32), (7, torch.float16)):
    check_writing(dtype, programs, lengths=[300, 3, 41, 30], rows=[1, 1, 1, 1], starts=[0, 2, 17, 0])
    check_writing(dtype, programs, lengths=[1, 5], rows=[1, 1])
    check_writing(dtype, programs, lengths=[60, 33, 9, 100], rows=[3, 1, 0, 5], starts=[0, 9, 0, 64], norms=True)
    check_writing(dtype, programs, lengths=[200, 12, 70], rows=[1, 2, 5], window=33)
    check_writing(dtype, programs, lengths=[200, 12, 70], rows=[1, 2, 5], window=3, page=7)
    check_writing(dtype, programs, lengths=[90, 90], rows=[1, 3], shifts=True, page=8)
    check_writing(dtype, programs, lengths=[40, 90], rows=[1, 3], chunks=3, layout="token", cap=3.0)
print(f"{count} cases equal the reference")
