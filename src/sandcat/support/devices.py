"""Devices and dtypes by their names."""

from __future__ import annotations

import torch

from sandcat.errors import DeviceError
from sandcat.support import processes


def pick_device(device: str | None) -> torch.device:
    """
    Raises:
        DeviceError: this machine has no such device.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available() and processes.count() > 1:
        return torch.device("cuda", torch.cuda.current_device())  # each process has its own
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"{device!r} is no device. Use cpu, cuda or cuda:N.") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda, but PyTorch sees no CUDA GPU here. Use --device cpu, or install a CUDA build."
        )
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{device!r}: this machine has {torch.cuda.device_count()} CUDA GPUs, numbered from 0.")
    if picked.type not in ("cpu", "cuda"):
        raise DeviceError(f"{device!r} is not supported. Use cpu, cuda or cuda:N.")
    return picked


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A dtype by its name; "auto" (or None) is the checkpoint's own."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    known = {
        "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
        "float16": torch.float16, "fp16": torch.float16,
    }  # fmt: skip
    if dtype not in known:
        raise DeviceError(f"dtype {dtype!r} is not known. Use auto, {', '.join(known)}.")
    return known[dtype]
