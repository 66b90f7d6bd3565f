"""What every launch of a CUDA kernel needs to know of its device."""

from __future__ import annotations

import functools

import torch
import triton.language as tl

from sandcat.ops.triton.primitives.blocks import PTX
from sandcat.ops.weights import FORMATS, Stored


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
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


@functools.cache
def _knows_e4m3(device: torch.device) -> bool:
    """Whether kernels may have numbers of that type, which NVIDIA's from 8.9 on can widen."""
    return PTX.value and torch.cuda.get_device_capability(device) >= (8, 9)


def codes(weight: Stored) -> torch.Tensor:
    """A matrix as kernels take it: what their GPU has no type for, as bytes."""
    if weight.codes.dtype == torch.float8_e4m3fn and not _knows_e4m3(weight.codes.device):
        return weight.codes.view(torch.uint8)
    return weight.codes


def code_of(format: str) -> int:
    """What kernels know a format by."""
    return FORMATS[format].code


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
