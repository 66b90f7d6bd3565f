"""Every path that a processor chooses, on this one: by its own instructions where it has them, else by stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PATHS, can_run, environment

from sandcat.ops.numba.primitives import processor


@pytest.mark.parametrize("name", PATHS)
def test_products_and_sums(name, record_property):
    path = PATHS[name]
    if name == processor.path():
        pytest.skip("the path of this processor, which all other tests take")
    if not can_run(path) and not path.stand_in:
        pytest.skip("this processor cannot run it, and nothing stands in for it")
    run = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("run_rows.py")), name]
    environ = environment(path) if can_run(path) else os.environ
    done = subprocess.run(run, capture_output=True, text=True, timeout=880, env=environ)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert done.stdout.strip() == name
    record_property("path", name if can_run(path) else f"{name} (stand-ins)")
