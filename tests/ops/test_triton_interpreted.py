"""The Triton kernels without a GPU: what they compute, by the interpreter, and that they compile for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("script", ["interpret_triton.py", "compile_triton.py"])
def test_script(script):
    run = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script))]
    done = subprocess.run(run, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    if script == "interpret_triton.py":
        assert "38 cases equal the reference" in done.stdout
    else:
        spills = [line for line in done.stdout.splitlines() if int(line.split()[-4]) > 16]
        assert len(done.stdout.splitlines()) == 33 and not spills
