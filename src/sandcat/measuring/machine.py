"""What figures are measured on: the processor, the GPU, and the versions that matter."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path

import torch

from sandcat.version import __version__


def machine(device: torch.device | str) -> dict[str, str]:
    """The facts that a report has beside its figures."""
    device = torch.device(device)
    facts = {"cpu": _cpu(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    facts |= {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    return facts | _installed("torch", "transformers", "sandcat", "triton" if device.type == "cuda" else "numba")


def versions() -> dict[str, str]:
    """What `sandcat --version` prints."""
    device = f"cuda, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"cpu, {_cpu()}"
    packages = _installed("torch", "transformers", "triton", "numba", "vllm")
    return {"sandcat": __version__, "python": platform.python_version(), **packages, "device": device}


def _installed(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
