"""The gradients of ops are those of their references, and what is dropped gives none."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from written_out import both

T, H, I, O = 3, 20, 36, 28


def random(*shape):
    return torch.randn(*shape) * shape[-1] ** -0.5


def arguments(name):
    x, a, bias = torch.randn(T, H), torch.randn(T, I), torch.randn(H)
    up, down, t_I, t_H = random(I, H), random(I, H), torch.rand(I), torch.rand(H)
    codes = torch.randint(-127, 128, (O, H), dtype=torch.int8)
    given = {
        "sparse_linear": (x, random(H, O), t_H, torch.randn(O)),
        "sparse_linear, int8": (x, codes.t(), t_H, None, torch.rand(O)),
        "sparse_linear, fp8": (x, random(H, O).to(torch.float8_e4m3fn), t_H, None, torch.rand(O)),
        "sparse_mlp": (x, random(I, H), up, down, t_I / 4, "silu", torch.randn(I)),
        "sparse_up_down": (x, a, up, down, t_I, None, bias),
        "shared_linear": (x, random(H, O), t_H, torch.randn(O)),
        "shared_up_down": (x, a, up, down, t_I, None, bias),
        "core_mlp": (x, random(I, H), up, down, torch.rand(T, I) > 0.5, "gelu"),
        "stored_linear": (x, codes, torch.rand(O), torch.randn(O)),
    }[name]
    return *both(name.split(",")[0]), given


NAMES = (
    "sparse_linear", "sparse_linear, int8", "sparse_linear, fp8", "sparse_mlp", "sparse_up_down", "shared_linear",
    "shared_up_down", "core_mlp", "stored_linear",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_autograd_of_the_reference(name):
    torch.manual_seed(0)
    op, reference, given = arguments(name)
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point() and t.itemsize > 1]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = torch.randn(reference(*given).shape)
    found, want = (
        torch.autograd.grad((run(*given) * weights).sum(), leaves, allow_unused=True) for run in (op, reference)
    )
    assert sum(g is not None for g in want) >= 2
    for one, other in zip(found, want, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert_close(one, other, torch.float32)


def test_what_no_token_keeps_gets_zero():
    torch.manual_seed(0)
    sparse_linear, sparse_mlp = both("sparse_linear")[0], both("sparse_mlp")[0]
    x, weight, threshold = torch.randn(T, H), random(H, O).requires_grad_(), torch.full((H,), 0.1)
    threshold[5] = torch.inf
    sparse_linear(x, weight, threshold).sum().backward()
    assert weight.grad[5].abs().max() == 0 and weight.grad[6].abs().max() > 0
    gate, up, down = (random(I, H).requires_grad_() for _ in range(3))
    threshold = torch.zeros(I)
    threshold[7] = torch.inf
    sparse_mlp(x, gate, up, down, threshold, "silu").sum().backward()
    assert all(m.grad[7].abs().max() == 0 and m.grad[8].abs().max() > 0 for m in (gate, up, down))
