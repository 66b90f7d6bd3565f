"""The gradients of ops are those of their references, and what is dropped gives none."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close

from sandcat.ops.core_mlp import core_mlp
from sandcat.ops.core_mlp import reference as core_reference
from sandcat.ops.int8_linear import int8_linear
from sandcat.ops.int8_linear import reference as int8_reference
from sandcat.ops.shared_units import reference_linear, reference_up_down, shared_linear, shared_up_down
from sandcat.ops.sparse_linear import reference as linear_reference
from sandcat.ops.sparse_linear import sparse_linear
from sandcat.ops.sparse_mlp import reference as mlp_reference
from sandcat.ops.sparse_mlp import reference_up_down as own_up_down
from sandcat.ops.sparse_mlp import sparse_mlp, sparse_up_down

T, H, I, O = 3, 20, 36, 28


def random(*shape):
    return torch.randn(*shape) * shape[-1] ** -0.5


def arguments(name):
    x, a, bias = torch.randn(T, H), torch.randn(T, I), torch.randn(H)
    up, down, t_I, t_H = random(I, H), random(I, H), torch.rand(I), torch.rand(H)
    codes = torch.randint(-127, 128, (O, H), dtype=torch.int8)
    return {
        "sparse_linear": (sparse_linear, linear_reference, (x, random(H, O), t_H, torch.randn(O))),
        "sparse_linear, int8": (sparse_linear, linear_reference, (x, codes.t(), t_H, None, torch.rand(O))),
        "sparse_mlp": (sparse_mlp, mlp_reference, (x, random(I, H), up, down, t_I / 4, "silu", torch.randn(I))),
        "sparse_up_down": (sparse_up_down, own_up_down, (x, a, up, down, t_I, None, bias)),
        "shared_linear": (shared_linear, reference_linear, (x, random(H, O), t_H, torch.randn(O))),
        "shared_up_down": (shared_up_down, reference_up_down, (x, a, up, down, t_I, None, bias)),
        "core_mlp": (core_mlp, core_reference, (x, random(I, H), up, down, torch.rand(T, I) > 0.5, "gelu")),
        "int8_linear": (int8_linear, int8_reference, (x, codes, torch.rand(O), torch.randn(O))),
    }[name]


NAMES = (
    "sparse_linear", "sparse_linear, int8", "sparse_mlp", "sparse_up_down", "shared_linear", "shared_up_down",
    "core_mlp", "int8_linear",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_autograd_of_the_reference(name):
    torch.manual_seed(0)
    op, reference, given = arguments(name)
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point()]
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
    x, weight, threshold = torch.randn(T, H), random(H, O).requires_grad_(), torch.full((H,), 0.1)
    threshold[5] = torch.inf
    sparse_linear(x, weight, threshold).sum().backward()
    assert weight.grad[5].abs().max() == 0 and weight.grad[6].abs().max() > 0
    gate, up, down = (random(I, H).requires_grad_() for _ in range(3))
    threshold = torch.zeros(I)
    threshold[7] = torch.inf
    sparse_mlp(x, gate, up, down, threshold, "silu").sum().backward()
    assert all(m.grad[7].abs().max() == 0 and m.grad[8].abs().max() > 0 for m in (gate, up, down))
