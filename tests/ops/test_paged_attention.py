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
from sandcat.ops.paged_attention import Pages, Rows, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["own", "token", "head"]
"""Whose a page is: one head's alone, or all heads', which lie side by side in a token, or apart."""

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(
    lengths: Sequence[int], rows: Sequence[int], *, dtype=torch.float32, device="cpu", starts=0, heads=(4, 2), size=64,
    page=16, chunks=1, layout="own", turned=False, shifts=False, scaling=None, window=None, cap=None, seed=0,
) -> tuple:  # fmt: skip
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
    place = torch.device(device)
    pages = Pages(keys, values, *(t.to(place) for t in (table_BNM, start_BN, length_BN)))
    rest = Rows(torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=place), max(rows))
    if turned:
        turn_LD = torch.arange(max(lengths))[:, None] * 0.3 ** torch.arange(size // 2).repeat(2)
        position = [t for length, count in zip(lengths, rows, strict=True) for t in range(length - count, length)]
        angles = [angle.to(dtype).to(place) for angle in (turn_LD.cos(), turn_LD.sin())]
        rest = Rows(rest.first_B, rest.most, torch.tensor(position, dtype=torch.int32, device=place), *angles)
        if shifts:
            shift_BNM = torch.randint(0, min(position) + 1, table_BNM.shape, generator=generator)
            pages = pages._replace(shift_BNM=shift_BNM.int().to(place))
    return randn(sum(rows), H, size).to(place), pages, rest, scaling or size**-0.5, window, cap


def exact(q_RHD: Tensor, pages: Pages, rows: Rows, *options) -> Tensor:
    """The reference in float32; what is turned is rounded as in the dtype."""
    if rows.position_R is None:
        keys, values = ([chunk.float() for chunk in pool] for pool in pages[:2])
        q_RHD, pages = q_RHD.float(), pages._replace(keys=keys, values=values)
    return reference(q_RHD, pages, rows, *options)


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
    assert_close(paged_attention(*args), exact(*args), dtype)
    assert kernel_name("paged_attention", device) == {"cpu": "numba", "cuda": "triton"}[device]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("device", DEVICES)
def test_pages_of_any_owner(layout, page, device):
    args = arguments([300, 3, 41], [1, 2, 1], layout=layout, page=page, chunks=2, heads=(8, 4), device=device)
    assert_close(paged_attention(*args), reference(*args), torch.float32)


def test_reference_equals_attention_of_torch():
    q_RHD, pages, rows, *options = arguments([40], [40], layout="token")
    entry = pages.table_BNM[0, 0, :3].long()
    k, v = (pool[0][entry].flatten(0, 1)[:40].transpose(0, 1) for pool in pages[:2])
    want = F.scaled_dot_product_attention(q_RHD.transpose(0, 1), k, v, is_causal=True, enable_gqa=True)
    assert_close(reference(q_RHD, pages, rows, *options), want.transpose(0, 1), torch.float32)


def test_work_is_shared_among_threads():
    args = arguments(**CASES["unequal"] | {"rows": [1, 2, 1, 3]})
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            assert_close(paged_attention(*args), reference(*args), torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
def test_writes_the_last_tokens(dtype, layout, device):
    _, pages, rows, *_ = arguments([40, 9, 90], [3, 0, 20], layout=layout, chunks=3, page=7, dtype=dtype, device=device)
    before = [[chunk.clone() for chunk in pool] for pool in pages[:2]]
    k, v = (torch.randn(25, 2, 64).to(dtype).to(device) for _ in range(2))  # the last two belong to no sequence
    paged_write(k, v, pages, rows.first_B)
    (P, S), first = pages.keys[0].shape[:2], rows.first_B.tolist()
    for b, n in itertools.product(range(3), range(2)):
        for row in range(first[b], first[b + 1]):
            index = int(pages.length_BN[b, n]) - first[b + 1] + row
            chunk, page = divmod(int(pages.table_BNM[b, n, index // S]), P)
            for pool, was, new in zip(pages[:2], before, (k, v), strict=True):
                assert torch.equal(pool[chunk][page, index % S, n], new[row, n])
                was[chunk][page, index % S, slice(None) if layout == "own" else n] = new[row, n]
    for pool, was in zip(pages[:2], before, strict=True):  # and nothing else is written
        assert all(torch.equal(*(t.nan_to_num(7) for t in pair)) for pair in zip(pool, was, strict=True))


def test_is_an_op_of_torch():
    args = arguments([20, 9], [2, 1], turned=True, shifts=True, window=8)
    flat = paged_attention.flat(*args)
    torch.library.opcheck(paged_attention.op, flat, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(torch.compile(lambda: paged_attention(*args), fullgraph=True)(), paged_attention(*args))
    _, pages, rows, *_ = arguments([20, 9], [2, 1], layout="token")
    flat = paged_write.flat(*torch.randn(2, 3, 2, 64), pages, rows.first_B)
    torch.library.opcheck(paged_write.op, flat, test_utils=("test_schema", "test_faketensor"))


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
    q_RHD, pages, rows, *options = arguments([30], [1])
    pages, rows = (
        t._replace(**{name: value for name, value in wrong.items() if name in t._fields}) for t in (pages, rows)
    )
    with pytest.raises((ValueError, IndexError), match=match):
        paged_attention(wrong.get("q_RHD", q_RHD), pages, rows, *options)
