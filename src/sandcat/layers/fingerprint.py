"""Telling the tensors of a plan from memory left over."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PART = 2**20
"""Codes that are widened at once."""


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a module of ours has beyond those of the dense one at its place: thresholds, codes, scales."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    dense = ("weight", "bias") if getattr(module, "format", "float") == "float" else ("bias",)
    return {
        n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in tensors.items() if n not in dense
    }


def fingerprint(module: nn.Module) -> dict[str, float]:
    """`magnitude` of each such tensor, by which `agrees` tells it from memory left over."""
    return {name: magnitude(tensor) for name, tensor in own_tensors(module).items()}


def magnitude(tensor: Tensor) -> float:
    """Mean magnitude of what is finite in a tensor of floats; mean of whole numbers."""
    if tensor.is_floating_point() and tensor.itemsize > 1:
        return float(tensor[tensor.isfinite()].double().abs().mean().nan_to_num())
    parts = tensor.flatten().split(2**20)  # as a sum widens all that it is given
    if tensor.is_floating_point():  # of one byte, of which PyTorch knows no sums
        return sum(float(part.float().abs().sum()) for part in parts) / tensor.numel()
    return sum(int(part.sum()) for part in parts) / tensor.numel()


def agrees(tensor: Tensor, expected: float) -> bool:
    """Whether a tensor can be the one that had the magnitude `expected`, in this dtype or a wider one."""
    found = magnitude(tensor)
    if abs(found - expected) <= 0.02 * abs(expected) + 1e-6:
        return True
    # What a narrower dtype cannot hold has become infinite there, and is missing from the sum.
    can_overflow = tensor.is_floating_point() and tensor.itemsize > 1
    beyond = float(tensor.isinf().double().mean()) if can_overflow else 0
    return beyond > 0 and found * (1 - beyond) <= 1.02 * expected
