"""The Triton kernels without a GPU: what they compute, by the interpreter, and that they compile for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def output(script: str, *arguments: str) -> str:
    run = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    return done.stdout


def test_ops_equal_their_references():
    assert "302 cases equal the reference" in output("interpret_triton.py")


def test_attention_over_pages_equals_its_reference():
    assert "90 cases equal the reference" in output("interpret_paged.py")


@pytest.mark.parametrize(
    "kinds",
    [{"float": 18, "deterministic": 5}, {"int8": 15, "layers": 34}, {"batch": 21, "launches": 13}],
    ids=" ".join,
)
def test_fused_step_equals_that_of_transformers(kinds):
    """And has as few launches as ever."""
    said = output("interpret_step.py", *kinds)
    for kind, count in kinds.items():
        assert f"{kind}: {count} are right" in said


@pytest.mark.parametrize("format, least", [("float", 100), ("int8", 40), ("fp8", 40)])
def test_compiles_without_spilling_registers(format, least):
    lines = output("compile_triton.py", format).splitlines()
    assert len(lines) > least and all(line.endswith(" stack 0") for line in lines)


def test_attention_over_pages_compiles_without_spilling_registers():
    lines = output("compile_paged.py").splitlines()
    assert len(lines) == 5 and all(line.endswith(" stack 0") for line in lines)
