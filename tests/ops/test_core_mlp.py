"""sandcat::core_mlp: the CPU kernel against the reference, and that it touches no row but the core's."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from written_out import both

from sandcat.ops import kernel_name
from sandcat.ops.checks import MAX_TOKENS
from sandcat.rounding import quantised

core_mlp, reference = both("core_mlp")


def arguments(tokens, hidden, neurons, dtype, biases=True, share=0.5):
    generator = torch.Generator().manual_seed(tokens + hidden + neurons)

    def random(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    core = torch.rand(tokens, neurons, generator=generator) < share
    weights = [random(neurons, hidden) for _ in range(3)]
    rest = [random(neurons), random(neurons), random(hidden)] if biases else [None] * 3
    return [random(tokens, hidden) * 5, *weights, core, "silu", *rest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 63, 97), (1, 576, 1536), (3, 32, 72), (8, 1, 1), (2, 40, 4097)], ids=str)
def test_kernel_equals_reference(shape, dtype, poisoned):
    assert kernel_name("core_mlp", "cpu") == "numba"
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        for biases, share in ((True, 0.5), (False, 0.1), (False, 0.0), (True, 1.0)):
            args = arguments(*shape, dtype, biases, share)
            args[5] = activation
            args[3] = args[3].t().contiguous().t()  # as it lies in a model that is not packed
            assert_close(core_mlp(*args), reference(*args), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_codes(dtype, format):
    """All, or gate only."""
    for names in ((1, 2, 3), (1,)):
        args = arguments(2, 48, 130, dtype) + [None] * 3
        for place in names:
            weight = args[place].t() if place == 3 else args[place]
            codes, scale = quantised(weight, format=format)
            args[place], args[8 + place] = codes.t() if place == 3 else codes, scale[:, 0]
        assert_close(core_mlp(*args), reference(*args), dtype)


def test_no_other_row_is_read():
    args = arguments(1, 64, 300, torch.float32)
    want = reference(*args)
    for weight in args[1:4]:
        weight[~args[4][0]] = float("nan")
    assert_close(core_mlp(*args), want, torch.float32)


def test_opcheck_and_bad_arguments():
    args = arguments(2, 16, 24, torch.float32)
    core_mlp.opcheck(*args, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="core is"):
        core_mlp(*args[:4], args[4].float(), *args[5:])
    with pytest.raises(ValueError, match=f"1 to {MAX_TOKENS} tokens"):
        core_mlp(*arguments(MAX_TOKENS + 1, 16, 24, torch.float32))
