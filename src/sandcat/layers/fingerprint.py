"""Telling the tensors of a plan from memory left over."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module of ours has beyond those of the dense one at its place: thresholds, codes, scales."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach()
        for n, t in tensors.items()
        if n not in ("weight", "bias") or not t.is_floating_point()
    }


def fingerprint(module: nn.Module) -> dict[str, float]:
    """Mean magnitude of each such tensor (mean of codes), infinities left out: tells it from memory left over."""
    return {
        name: float(t[t.isfinite()].double().abs().mean().nan_to_num())
        if t.is_floating_point()
        else sum(int(part.sum()) for part in t.flatten().split(2**20)) / t.numel()  # a sum widens all that it is given
        for name, t in own_tensors(module).items()
    }
