"""The kernel of sandcat::sparse_up against its reference, and that it touches no row of a dropped neuron."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_close
from written_out import both

from sandcat.ops import kernel_name
from sandcat.ops.checks import MAX_TOKENS
from sandcat.rounding import quantised

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

FORMATS = ["float", "int8", "fp8"]
sparse_up, reference = both("sparse_up")

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(tokens, hidden, neurons, dtype, device="cpu", *, bias=False, format="float", seed=0):
    """Random inputs whose thresholds drop about half of the neurons."""
    generator = torch.Generator().manual_seed(seed)
    x, a, up = (
        torch.randn(rows, columns, generator=generator)
        for rows, columns in ((tokens, hidden), (tokens, neurons), (neurons, hidden))
    )
    up = up * hidden**-0.5
    threshold = a.abs().quantile(0.5) * (0.5 + torch.rand(neurons, generator=generator))
    added = torch.randn(neurons, generator=generator).to(dtype) if bias else None
    args = [t.to(dtype) for t in (x, a, up, threshold)] + [added]
    if format != "float":
        args[2], scale = quantised(up.to(dtype), format=format)
        args.append(scale[:, 0])
    return [t if t is None else t.to(device) for t in args]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden, neurons", [(1, 1), (63, 1), (1, 63), (576, 1536), (65, 4097)])
@pytest.mark.parametrize("tokens", [1, 3, MAX_TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference(dtype, hidden, neurons, tokens, bias, format, device):
    args = arguments(tokens, hidden, neurons, dtype, device, bias=bias, format=format)
    exact = args
    if device == "cpu" or tokens == 1:  # the kernels round once; a bias may cancel a product that is rounded before
        exact = [t.float() if t is not None and t.itemsize > 1 else t for t in args]
    assert_close(sparse_up(*args), reference(*exact), dtype)
    assert kernel_name("sparse_up", device, format) == {"cpu": "numba", "cuda": "triton"}[device]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_dropped_neurons_are_not_read(device):
    args = arguments(1, 64, 96, torch.float32, device)
    want = reference(*args)
    dropped = args[1][0].abs() <= args[3]
    assert 0 < dropped.sum() < 96
    args[2][dropped] = float("nan")
    found = sparse_up(*args)
    assert_close(found, want, torch.float32)
    assert bool((found[0, dropped] == 0).all())


def test_not_contiguous_and_not_finite():
    args = arguments(3, 64, 96, torch.float32, bias=True)
    args[1][1, 5] = float("nan")  # kept: it comes out of what is multiplied with it later
    strided = [torch.stack([t, t], -1)[..., 0] for t in args]
    assert_close(sparse_up(*strided), reference(*args), torch.float32)


def test_is_an_op_of_torch():
    args = arguments(2, 16, 24, torch.float32)
    sparse_up.opcheck(*args, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match="takes 1 to"):
        sparse_up(*arguments(MAX_TOKENS + 1, 16, 24, torch.float32))
