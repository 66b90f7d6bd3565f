"""What modules that run by one of our ops have in common: all that evaluation, benchmarks and reports know of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from sandcat.ops import FORMATS, PROMPT_CHUNK, kernel_name, most_tokens


class Kernel(nn.Module, ABC):
    """Runs a few tokens by the kernel of its op, and more by dense products. Shapes: x [..., H], H numbers a token."""

    op: ClassVar[str]
    """The op that runs it."""
    format = "float"
    """How its weights are stored, a name of `FORMATS`; where they are stored in several ways, one that has codes."""

    def __init__(self):
        nn.Module.__init__(self)  # of an `nn.Linear` that it is besides, it has the attributes, and makes no weights
        self.by_reference = False

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """`.half()` and the like change what a module computes in, and leave codes as they are, though they be
        floats."""
        codes = FORMATS[self.format].codes

        def of_numbers(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.int8)).view(codes) if tensor.dtype == codes else fn(tensor)

        return super()._apply(of_numbers, recurse)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What it computes in: the dtype of its weights, or of their scales."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers in one of its weight matrices."""

    @abstractmethod
    def by_kernel(self, x: Tensor) -> Tensor:
        """The op on a few tokens, [tokens, outputs]."""

    @abstractmethod
    def by_definition(self, x: Tensor) -> Tensor:
        """The same by dense products, for any number of tokens, [..., outputs]."""

    @abstractmethod
    def weight_bytes(self, kept: float = 1.0) -> int:
        """Bytes that are read if a share `kept` of what can be skipped is."""

    def bytes_read(self, x: Tensor) -> int:
        """Bytes that a decode step of these sequences reads, x [B, 1, H]."""
        return self.weight_bytes()

    def forward(self, x: Tensor) -> Tensor:
        """`run`, under `torch.autocast` too, which gives a layer inputs of any dtype and wants its own back.

        A kernel takes one dtype, that of the weights. Dense products are autocast's, as those of dense layers are.
        """
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.run(x)
        wanted, x = torch.get_autocast_dtype(device), x.to(self.dtype)
        with torch.autocast(device, enabled=not self.pays(x)):
            return self.run(x).to(wanted)

    def run(self, x: Tensor) -> Tensor:
        """What it computes of inputs in its own dtype, [..., outputs]."""
        if self.pays(x) and not self.by_reference:
            return self.by_kernel(x).to(x.dtype).view(*x.shape[:-1], -1)
        if x.shape[-2] == 1:
            return self.by_definition(x).to(x.dtype)
        parts = x.reshape(1, -1, x.shape[-1]).split(PROMPT_CHUNK, 1)
        parts = [self.by_definition(part).to(x.dtype) for part in parts]
        y_1TO = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y_1TO.view(*x.shape[:-1], y_1TO.shape[-1])

    def pays(self, x: Tensor) -> bool:
        """Whether the kernel is the faster way for these tokens; by dense products they come to the same."""
        return tokens_of(x) <= self.most_tokens(x)

    def most_tokens(self, x: Tensor) -> int:
        """Up to how many tokens it is, for tokens like these."""
        return most_tokens(self.op_for(x), x.device, x.dtype, self.size, self.format)

    def op_for(self, x: Tensor) -> str:
        """The op that runs such tokens."""
        return self.op

    def largest_batch(self, x: Tensor) -> int | None:
        """Above how many sequences a step reads what it drops, for steps like x; None: it drops nothing."""
        return None

    def step_kernel(self, x: Tensor) -> str:
        """What runs a decode step of these sequences, x [B, 1, H]: as `kernel`, or "masked" where what is dropped is
        read, and counts as 0."""
        return self.kernel(x.device) if self.pays(x) else "reference"

    def kernel(self, device: torch.device) -> str:
        """What runs the op there: "numba", "triton" or "reference"."""
        return kernel_name(self.op, device, self.format)


def tokens_of(x: Tensor) -> int:
    """How many there are in x [..., I]."""
    return math.prod(x.shape[:-1])


def kernels_of(model: nn.Module) -> dict[str, str]:
    """What runs each op of a model on its device, and above which batch its modules read everything, masked (by their
    sizes)."""
    two_21H = torch.empty(2, 1, 0, dtype=model.dtype, device=model.device)
    kernels: dict[str, str] = {}
    largest: dict[str, set[int]] = {}
    for module in kernel_modules(model).values():
        kernels |= dict.fromkeys((module.op, module.op_for(two_21H)), module.kernel(model.device))
        if (batch := module.largest_batch(two_21H)) is not None:
            largest.setdefault(module.op_for(two_21H), set()).add(batch)
    texts = {}
    for op, kernel in sorted(kernels.items()):
        batches = " to ".join(map(str, sorted({min(largest[op]), max(largest[op])}))) if op in largest else ""
        texts[op] = f"{kernel}, masked above batch {batches}" if batches and kernel != "reference" else kernel
    return texts


def kernel_modules(model: nn.Module) -> dict[str, Kernel]:
    """The modules of a model that run by our ops, by their names, in order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Kernel)}
