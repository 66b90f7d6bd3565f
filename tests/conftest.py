"""What all tests share: no network, PyTorch's memory poisoned where it is uninitialised, devices, and comparison."""

from __future__ import annotations

import itertools
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

with torch.device("meta"):  # lists what it catches at its first use, which must not find `torch.empty` poisoned
    torch.empty(0)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative RMS error allowed between a kernel and its reference."""


FIRST = (
    "test_step_parity.py",
    "test_triton_interpreted.py",
    "test_docs.py",
    "test_contract.py",
    "test_integrations.py",
)
"""Of two workers one compiles the fused steps for all dtypes first, while the other runs what needs none of them: else
both would compile them. Then long files, so that none is the last. The tests of a file run on one worker, as they share
what is compiled, and fixtures."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is the name of any folder above, too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter):
    """Which paths of the CPU kernels ran, and where."""
    from sandcat.measuring.machine import machine
    from sandcat.ops.numba.primitives import processor

    reports = terminalreporter.getreports("passed")
    forced = [value for report in reports for key, value in report.user_properties if key == "path"]
    terminalreporter.write_line(f"CPU paths on {machine('cpu')['cpu']}: {processor.path()}")
    for path in sorted(forced):
        terminalreporter.write_line(f"  and forced: {path}")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over RMS of the expected; NaN and infinities must stand at the same places."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isinf()].sign(), expected[expected.isinf()].sign())
    finite = expected.isfinite()
    difference, size = (found - expected)[finite].norm(), expected[finite].norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = relative_error(found, expected)
    assert error <= TOLERANCE[dtype], f"relative RMS error {error:.2e} > {TOLERANCE[dtype]:.0e}"


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def kernels_pay(monkeypatch):
    """Small models run by kernels too, up to 8 tokens (in 16 bits 2, and 4 that share), where else they would run dense
    as that is faster."""
    from sandcat.ops import FORMATS, pays

    def most(op: str, dtype: torch.dtype) -> int:
        return 8 if dtype == torch.float32 else 4 if "shared" in op else 2

    cases = itertools.product(pays._ALL, ["cpu"], pays._FLOATS, FORMATS)
    monkeypatch.setattr(pays, "_MOST_TOKENS", {case: (most(case[0], case[2]),) * 2 for case in cases})


@pytest.fixture
def poisoned(monkeypatch):
    """Fills what `torch.empty` gives with NaN (integers: a large number), so that what is left unwritten shows."""
    empty = torch.empty

    def full(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        with torch.no_grad():
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 127 if tensor.itemsize == 1 else 2**30)

    monkeypatch.setattr(torch, "empty", full)
