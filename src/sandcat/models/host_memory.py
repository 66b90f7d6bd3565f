"""Memory of the host: what was copied out of a checkpoint that is mapped into memory is not held twice, and weights
that every token reads lie in large pages.

transformers maps safetensors into memory, and a page that was read stays there as long as any tensor of its file does.
A tensor that is laid out anew (transposed for a kernel, moved to a cache line) leaves its pages behind: without this, a
sparse model would come to twice its size.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

DONT_NEED = 4  # MADV_DONTNEED: pages of a file are read again if somebody wants them
HUGE_PAGE, COLLAPSE = 14, 25  # MADV_HUGEPAGE, and MADV_COLLAPSE (Linux 6.1): at once, where the pages lie
LARGE = 2**21
"""Bytes of a large page on x86 and on Arm."""
MAPS = Path("/proc/self/maps")


class FilePages:
    """The pages of checkpoint files that a model lies in; on Linux, elsewhere none.

    Only for a model that has just been loaded: what was written into such pages since would be lost.
    """

    def __init__(self, model: nn.Module):
        tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if _is_here(tensor)]
        files = list(_mapped_files())
        starts = [start for start, _ in files]
        self.spans = {}
        for tensor in tensors:
            first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            place = bisect.bisect_right(starts, first) - 1
            if place >= 0 and end <= files[place][1]:
                self.spans[tensor] = (first, end)

    def give_back(self) -> None:
        """Drops the pages of tensors that lie elsewhere by now."""
        for tensor, (first, end) in list(self.spans.items()):
            if tensor.data_ptr() != first:
                del self.spans[tensor]
                first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if first < end:  # else it has no page of its own
                    _advise(first, end, DONT_NEED)


def use_large_pages(tensors: Iterable[Tensor]) -> None:
    """Asks Linux to keep these tensors in pages of 2 MB where they lie, in which they are read faster (the processor
    finds a page's place in one table entry, not in 512). Elsewhere, or if there are none, nothing changes."""
    if not sys.platform.startswith("linux"):
        return
    spans: list[list[int]] = []
    for first, end in sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors):
        first, end = first // LARGE * LARGE, -(-end // LARGE) * LARGE
        if spans and first <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([first, end])
    for first, end in spans:
        for page in range(first, end, LARGE):  # one by one: a page that can't be had does not stop the others
            _advise(page, page + LARGE, HUGE_PAGE)
            _advise(page, page + LARGE, COLLAPSE)


def _advise(first: int, end: int, advice: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not isinstance(tensor, DTensor)


def _mapped_files() -> Iterator[tuple[int, int]]:
    """First address and end of every safetensors file in memory, in order."""
    for line in MAPS.read_text().splitlines() if MAPS.exists() else ():
        if line.endswith(".safetensors"):
            first, end = line.split(maxsplit=1)[0].split("-")
            yield int(first, 16), int(end, 16)
