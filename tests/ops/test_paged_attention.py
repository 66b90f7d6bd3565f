"""The kernels of sandcat::paged_attention and sandcat::paged_write against their references."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, assert_close
from torch import Tensor

from sandcat.ops import kernel_name, paged_attention, paged_write
from sandcat.ops.paged_attention import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["own", "token", "head"]
"""Whose a page is: one head's alone, or all heads', which lie side by side in a token, or apart."""

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(
    lengths: Sequence[int], rows: Sequence[int], *, dtype=torch.float32, device="cpu", starts=0, heads=(4, 2), size=64,
    page=16, chunks=1, layout="own", turned=False, shifts=False, seed=0, **options,
) -> dict:  # fmt: skip
    """Random arguments: pages in random order, NaN and numbers of no page wherever nothing may look. The last head has
    cached 5 tokens less than the first, where it can."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    (H, N), B, M = heads, len(lengths), -(-max(lengths) // page) + 1
    start_BN = torch.as_tensor(starts, dtype=torch.int32).expand(B)[:, None].repeat(1, N)
    length_BN = torch.tensor(lengths, dtype=torch.int32)[:, None].repeat(1, N)
    least_B = torch.minimum(length_BN[:, 0], start_BN[:, 0] + torch.tensor(rows))
    length_BN[:, -1] = torch.maximum(length_BN[:, -1] - 5, least_B)
    owners = N if layout == "own" else 1
    P = -(-(B * owners * M + 3) // chunks)
    table_BNM = (
        torch.randperm(chunks * P, generator=generator)[: B * owners * M]
        .view(B, owners, M)
        .int()
        .repeat(1, N // owners, 1)
    )
    pools = torch.full((2, chunks * P, page, N // owners, size), float("nan"), dtype=dtype)
    for b, n in itertools.product(range(B), range(N)):
        index = torch.arange(int(start_BN[b, n]), int(length_BN[b, n]))
        pools[:, table_BNM[b, n, index // page].long(), index % page, n % (N // owners)] = randn(2, len(index), size)
    entry = torch.arange(M) * page
    table_BNM[(entry + page <= start_BN[..., None]) | (entry >= length_BN[..., None])] = 2**30
    if layout == "head":
        pools = pools.transpose(2, 3).contiguous().transpose(2, 3)
    keys, values = ([c.expand(-1, -1, N, -1).to(device) for c in pool.split(P)] for pool in pools.to(device))
    first_B = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    found = {
        "q_RHD": randn(sum(rows), H, size), "keys": keys, "values": values, "table_BNM": table_BNM,
        "start_BN": start_BN, "length_BN": length_BN, "first_B": first_B, "most": max(rows),
        "scaling": size**-0.5, **options,
    }  # fmt: skip
    if turned:
        turn_LD = torch.arange(max(lengths))[:, None] * 0.3 ** torch.arange(size // 2).repeat(2)
        found |= {"cos_LD": turn_LD.cos().to(dtype), "sin_LD": turn_LD.sin().to(dtype)}
        position = [t for length, count in zip(lengths, rows, strict=True) for t in range(length - count, length)]
        found["position_R"] = torch.tensor(position, dtype=torch.int32)
        if shifts:
            found["shift_BNM"] = torch.randint(0, min(position) + 1, table_BNM.shape, generator=generator).int()
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in found.items()}


def exact(args: dict) -> Tensor:
    """The reference in float32; what is turned is rounded as in the dtype."""
    if "cos_LD" not in args and args["q_RHD"].device.type == "cpu":
        args = {name: [t.float() for t in v] if isinstance(v, list) else v for name, v in args.items()}
        args["q_RHD"] = args["q_RHD"].float()
    return reference(**args)


CASES = {
    "one token": dict(lengths=[1], rows=[1], starts=0),
    "one sequence": dict(lengths=[70], rows=[1]),
    "unequal": dict(lengths=[300, 3, 41, 30], rows=[1, 1, 1, 1], starts=[0, 2, 17, 0]),
    "drafts": dict(lengths=[60, 33, 9, 100], rows=[3, 1, 0, 5], starts=[0, 9, 0, 64]),
    "a piece of a prompt": dict(lengths=[90, 61], rows=[40, 1], starts=[0, 30]),
    "a whole prompt": dict(lengths=[37], rows=[37]),
    "window": dict(lengths=[200, 12, 70], rows=[1, 2, 20], window=33),
    "window of one page": dict(lengths=[200, 40], rows=[1, 4], window=16, starts=[180, 3]),
    "cap": dict(lengths=[50, 7], rows=[1, 2], cap=5.0, scaling=1.0),
    "nothing to see": dict(lengths=[20, 9], rows=[1, 3], starts=[20, 7]),
    "page of 1": dict(lengths=[23, 5], rows=[1, 2], page=1),
    "page of 7": dict(lengths=[123, 15], rows=[1, 2], page=7),
    "page of 256": dict(lengths=[623, 300, 2], rows=[1, 2, 1], page=256),
    "chunks": dict(lengths=[150, 80], rows=[1, 2], chunks=4),
    "one head": dict(lengths=[40, 90], rows=[1, 1], heads=(1, 1)),
    "many heads": dict(lengths=[40, 90], rows=[2, 1], heads=(24, 3), size=80),
    "sizes": dict(lengths=[40, 9], rows=[1, 2], heads=(3, 3), size=130),
    "large heads": dict(lengths=[40, 9], rows=[1, 2], size=256),
    "turned": dict(lengths=[40, 90], rows=[1, 3], turned=True, starts=[3, 0]),
    "shifts": dict(lengths=[40, 90], rows=[1, 3], turned=True, shifts=True, page=8),
    "shifts of large pages": dict(lengths=[240, 390], rows=[1, 3], turned=True, shifts=True, page=100, window=170),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference(name, dtype, device):
    args = arguments(**CASES[name], dtype=dtype, device=device)
    assert_close(paged_attention(**args), exact(args), dtype)
    assert kernel_name("paged_attention", device) == {"cpu": "numba", "cuda": "triton"}[device]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("device", DEVICES)
def test_pages_of_any_owner(layout, page, device):
    args = arguments([300, 3, 41], [1, 2, 1], layout=layout, page=page, chunks=2, heads=(8, 4), device=device)
    assert_close(paged_attention(**args), reference(**args), torch.float32)


def test_reference_equals_attention_of_torch():
    args = arguments([45], [45], layout="token")
    args["length_BN"] = torch.full_like(args["length_BN"], 40)
    q, first = args["q_RHD"][:40], torch.tensor([0, 40], dtype=torch.int32)
    entry = args["table_BNM"][0, 0, :3].long()
    k, v = (args[name][0][entry].flatten(0, 1)[:40].transpose(0, 1) for name in ("keys", "values"))
    want = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True, enable_gqa=True)
    assert_close(reference(**args | {"q_RHD": q, "first_B": first}), want.transpose(0, 1), torch.float32)


def test_work_is_shared_among_threads():
    args = arguments(**CASES["unequal"] | {"rows": [1, 2, 1, 3]})
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert_close(paged_attention(**args), reference(**args), torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_writes_the_last_tokens(dtype, layout, device):
    args = arguments([40, 9, 90], [3, 0, 20], layout=layout, chunks=3, page=7, dtype=dtype, device=device)
    pages = {name: args[name] for name in ("table_BNM", "length_BN", "first_B")}
    before = {name: [chunk.clone() for chunk in args[name]] for name in ("keys", "values")}
    k, v = (torch.randn(25, 2, 64).to(dtype).to(device) for _ in range(2))  # the last two belong to no sequence
    paged_write(k, v, args["keys"], args["values"], **pages)
    S, P = args["keys"][0].shape[1], len(args["keys"][0])
    for b, n, (first, end) in itertools.product((0, 1, 2), (0, 1), [(0, 3), (3, 3), (3, 23)]):
        if (first, end) != tuple(args["first_B"][b : b + 2].tolist()):
            continue
        index = torch.arange(int(args["length_BN"][b, n]) - (end - first), int(args["length_BN"][b, n]))
        for i, row in zip(index.tolist(), range(first, end), strict=True):
            page = int(args["table_BNM"][b, n, i // S])
            for name, new in (("keys", k), ("values", v)):
                assert torch.equal(args[name][page // P][page % P, i % S, n], new[row, n])
                before[name][page // P][page % P, i % S, slice(None) if layout == "own" else n] = new[row, n]
    for name, chunks in before.items():  # and nothing else is written
        assert all(torch.equal(*(t.nan_to_num(7) for t in pair)) for pair in zip(args[name], chunks, strict=True))


def test_is_an_op_of_torch():
    args = arguments([20, 9], [2, 1], turned=True, shifts=True, window=8)
    torch.library.opcheck(paged_attention, (), args, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(torch.compile(paged_attention, fullgraph=True)(**args), paged_attention(**args))
    k, v = (torch.randn(3, 2, 64) for _ in range(2))
    args = arguments([20, 9], [2, 1], layout="token")
    write = (k, v, args["keys"], args["values"], *(args[name] for name in ("table_BNM", "length_BN", "first_B")))
    torch.library.opcheck(paged_write, write, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"length_BN": torch.full((1, 2), 2000, dtype=torch.int32)}, "hold 3 of 16 tokens"),
        ({"table_BNM": torch.full((1, 2, 3), 99, dtype=torch.int32)}, "there are 9 pages"),
        ({"first_B": torch.tensor([0, 1])}, "first is"),
        ({"q_RHD": torch.randn(1, 3, 64)}, "that key-value heads divide"),
        ({"cos_LD": torch.randn(4, 64)}, "these come together"),
        ({"keys": [torch.randn(9, 16, 2, 64).half()]}, "keys.0. is"),
        ({"keys": [torch.randn(9, 16, 2, 128)[..., ::2]]}, "1 in a head"),
    ],
)
def test_refuses_what_it_cannot_read(wrong, match):
    with pytest.raises((ValueError, IndexError), match=match):
        paged_attention(**arguments([30], [1]) | wrong)
