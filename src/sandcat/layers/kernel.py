"""What modules that run by one of our ops have in common: all that evaluation, benchmarks and reports know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from sandcat.ops import PROMPT_CHUNK, kernel_name, most_tokens


class Kernel(nn.Module, ABC):
    """Runs a few tokens by the kernel of its op, and more by dense products. Shapes: T tokens, H numbers a token."""

    op: ClassVar[str]
    """The op that runs it."""

    def __init__(self):
        super().__init__()
        self.by_reference = False

    @property
    @abstractmethod
    def int8(self) -> bool:
        """Whether its weights are int8."""

    @abstractmethod
    def by_kernel(self, x_TH: Tensor, *settings: Tensor) -> Tensor:
        """The op on a few tokens."""

    @abstractmethod
    def by_definition(self, x_TH: Tensor, *settings: Tensor) -> Tensor:
        """The same by dense products, for any number of tokens."""

    def settings(self, x: Tensor) -> tuple[Tensor, ...]:
        """What a forward on x goes by, besides the weights."""
        return ()

    @abstractmethod
    def weight_bytes(self, kept: float = 1.0) -> int:
        """Bytes that are read if a share `kept` of what can be skipped is."""

    def bytes_read(self, x_TH: Tensor) -> int:
        """Bytes that the kernels read for these tokens."""
        return self.weight_bytes()

    def forward(self, x: Tensor) -> Tensor:
        x_TH, settings = x.reshape(-1, x.shape[-1]), self.settings(x)
        if self.pays(x_TH) and not self.by_reference:
            y_TH = self.by_kernel(x_TH, *settings).to(x.dtype)
        else:
            parts = [self.by_definition(part, *settings).to(x.dtype) for part in x_TH.split(PROMPT_CHUNK)]
            y_TH = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y_TH.view(*x.shape[:-1], y_TH.shape[-1])

    def pays(self, x_TH: Tensor) -> bool:
        """Whether the kernel is the faster way for these tokens."""
        return len(x_TH) <= most_tokens(self.op, x_TH.device, x_TH.dtype, self.int8)

    def kernel(self, device: torch.device) -> str:
        """What runs the op there: "numba", "triton" or "reference"."""
        return kernel_name(self.op, device, self.int8)


@contextmanager
def references(model: nn.Module) -> Iterator[None]:
    """Within this context the modules run their definition instead of the kernels."""
    for module in kernel_modules(model).values():
        module.by_reference = True
    try:
        yield
    finally:
        for module in kernel_modules(model).values():
            module.by_reference = False


def kernel_modules(model: nn.Module) -> dict[str, Kernel]:
    """The modules of a model that run by our ops, by their names, in order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Kernel)}
