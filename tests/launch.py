"""Starts a script as users start several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

TORCHRUN = ("-m", "torch.distributed.run")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no")


def launch(launcher: tuple[str, ...], *command: str, gpus: bool = False) -> str:
    """Standard output of two processes, on the CPU unless `gpus`; both have to end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    each = "--nproc_per_node" if launcher is TORCHRUN else "--num_processes"
    launcher = (*launcher, each, "2", "--main_process_port" if launcher is ACCELERATE else "--master_port", port)
    tests = str(Path(__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *launcher, *command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
