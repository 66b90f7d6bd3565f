"""What importing sandcat must not do."""

from __future__ import annotations

import subprocess
import sys


def test_a_lean_import():
    """Importing sandcat loads no plotting, no tasks, no datasets, and touches no GPU."""
    script = """
import sys, torch
torch.cuda.init = torch.cuda._lazy_init = lambda *a: (_ for _ in ()).throw(RuntimeError("CUDA was touched"))
import sandcat
heavy = {"matplotlib", "lm_eval", "datasets", "typer", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)
