"""What every launch of a CUDA kernel needs to know of its device."""

from __future__ import annotations

import functools

import torch
import triton.language as tl


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the programs on a multiprocessor share; each takes 1 KB for itself."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_multiprocessor - 2048


@functools.cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments that launch a kernel while the one before it runs, which NVIDIA's from 9.0 on can."""
    able = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


class Workspace:
    """Buffers that programs of one launch share, by name; zero at first, each as large as the largest launch needs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = torch.zeros(size, dtype=dtype, device=self.device)
        return self.buffers[name]
