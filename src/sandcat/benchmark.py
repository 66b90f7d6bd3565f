"""Speed: seconds and bytes a token, dense and sparse in pairs, interleaved. Refuses to time what fails its parity check."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sandcat.architectures import ModelView
from sandcat.errors import ParityError
from sandcat.generate import Decoder
from sandcat.layers.mlp import SparseMLP
from sandcat.ops import kernel_name
from sandcat.progress import track

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative RMS difference of logits, a step by kernels against the same step by the references."""


class Timer:
    """Runs several functions in turn and keeps the seconds each took. On a GPU each is captured in a CUDA graph."""

    def __init__(self, variants: dict[str, Callable[[], object]], device: torch.device):
        self.device = device
        self.variants = {name: self._prepared(run) for name, run in variants.items()}

    def _prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        run()
        if self.device.type != "cuda":
            return run
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _seconds(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def medians(self, runs: int) -> dict[str, float]:
        """The median seconds of each variant over interleaved runs, the first round left out."""
        taken: dict[str, list[float]] = {name: [] for name in self.variants}
        for _ in range(runs + 1):
            for name, run in self.variants.items():
                taken[name].append(self._seconds(run))
        return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def read_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that a plain sum reads from memory far larger than the caches; the best of several runs."""
    if device.type == "cuda":
        data = torch.randint(0, 2**30, ((size or 2**31) // 8,), device=device, dtype=torch.int64)
        timer = Timer({"read": data.sum}, device)
    else:
        data = torch.rand((size or 2**29) // 4)
        timer = Timer({"read": data.sum}, device)
    return data.nbytes / min(timer._seconds(timer.variants["read"]) for _ in range(7))
