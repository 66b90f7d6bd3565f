"""The gated MLP of a sparsified model. Shapes: see ops/sparse_mlp.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandcat.architectures import Site
from sandcat.ops import most_tokens
from sandcat.ops.sparse_mlp import ACTIVATIONS, PROMPT_CHUNK, reference, sparse_mlp


class SparseMLP(nn.Module):
    """Takes over the projections of a dense gated MLP, under their checkpoint names, and adds one threshold a neuron.

    Args:
        site: the dense MLP. Its linear layers are shared, not copied; on the meta device too.
        activation: a name of `ops.sparse_mlp.ACTIVATIONS`; default the model's own.
        dense_prompt: a forward with more than one token a sequence (a prompt) drops nothing.
    """

    def __init__(self, site: Site, *, activation: str | None = None, dense_prompt: bool = False):
        super().__init__()
        row = site.architecture
        self.gate_name, self.up_name, self.down_name = row.gate, row.up, row.down
        for name in dict.fromkeys((row.gate, row.up, row.down)):
            self.add_module(name, getattr(site.module, name))
        self.activation = activation or site.activation
        self.dense_prompt = dense_prompt
        self.by_reference = False
        down = self.down.weight
        self.register_buffer("threshold", torch.zeros(down.shape[1], dtype=down.dtype, device=down.device))

    @property
    def down(self) -> nn.Linear:
        return self.get_submodule(self.down_name)

    def _half(self, name: str, half: int) -> tuple[Tensor, Tensor | None]:
        linear = self.get_submodule(name)
        weight, bias = linear.weight, linear.bias
        if self.gate_name == self.up_name:  # one fused matrix: gate rows, then up rows
            weight = weight.chunk(2)[half]
            bias = None if bias is None else bias.chunk(2)[half]
        return weight, bias

    def gate(self) -> tuple[Tensor, Tensor | None]:
        """Weight [I, H] and bias [I] of the gate projection, views where it is fused."""
        return self._half(self.gate_name, 0)

    def up(self) -> tuple[Tensor, Tensor | None]:
        """Weight [I, H] and bias [I] of the up projection."""
        return self._half(self.up_name, 1)

    def pack(self) -> None:
        """Stores the down projection neuron-major, once; its shape [H, I] and its values stay, as a transposed view."""
        weight = self.down.weight
        weight.data = weight.data.t().contiguous().t()

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold
        if self.dense_prompt and x.shape[-2] > 1:
            threshold = torch.full_like(threshold, -1)
        (gate, gate_bias), (up, up_bias), down = self.gate(), self.up(), self.down
        args = (gate, up, down.weight.t(), threshold, self.activation, gate_bias, up_bias, down.bias)
        x_TH = x.reshape(-1, x.shape[-1])
        if x_TH.shape[0] <= most_tokens(x.device, x.dtype) and not self.by_reference:
            y_TH = sparse_mlp(x_TH, *args).to(x.dtype)
        else:
            y_TH = torch.cat([reference(chunk, *args).to(x.dtype) for chunk in x_TH.split(PROMPT_CHUNK)])
        return y_TH.view(x.shape)

    def activations(self, x_TH: Tensor) -> Tensor:
        """a = activation(gate(x)), [T, I]: what the thresholds are compared with."""
        return ACTIVATIONS[self.activation](F.linear(x_TH, *self.gate()))

    def kept(self, x_TH: Tensor) -> Tensor:
        """Which neurons each token keeps, bool [T, I]."""
        return ~(self.activations(x_TH).abs() <= self.threshold)

    def weight_bytes(self, kept: float = 1.0) -> int:
        """Bytes of weights and thresholds that are read if a share `kept` of the neurons is."""
        (gate, _), (up, _), down = self.gate(), self.up(), self.down.weight
        small = [parameter for parameter in self.parameters() if parameter.dim() == 1] + [self.threshold]
        return gate.nbytes + round(kept * (up.nbytes + down.nbytes)) + sum(t.nbytes for t in small)

    def bytes_read(self, x_TH: Tensor) -> int:
        """Bytes that the kernels read for these tokens: the gate, and the rows that any token keeps."""
        return self.weight_bytes(float(self.kept(x_TH).any(0).float().mean()))

    def extra_repr(self) -> str:
        return f"activation={self.activation}, dense_prompt={self.dense_prompt}"


@contextmanager
def references(model: nn.Module) -> Iterator[None]:
    """Within this context the sparse MLPs run their torch reference instead of the kernels."""
    for module in sparse_mlps(model).values():
        module.by_reference = True
    try:
        yield
    finally:
        for module in sparse_mlps(model).values():
            module.by_reference = False


def sparse_mlps(model: nn.Module) -> dict[str, SparseMLP]:
    """The sparse MLPs of a model by their names, in order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMLP)}
