"""The gated MLP of a sparsified model. Shapes: see ops/sparse_mlp.py."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sandcat.architectures import Site
from sandcat.layers.sparse import Sparse
from sandcat.ops.sparse_mlp import ACTIVATIONS, reference, sparse_mlp


class SparseMLP(Sparse):
    """Takes over the projections of a dense gated MLP, under their checkpoint names, and adds one threshold a neuron.

    Args:
        site: the dense MLP. Its linear layers are shared, not copied; on the meta device too.
        activation: a name of `ops.sparse_mlp.ACTIVATIONS`; default the model's own.
        dense_prompt: see `Sparse`.
    """

    unit = "neurons"
    op = "sparse_mlp"

    def __init__(self, site: Site, *, activation: str | None = None, dense_prompt: bool = False):
        super().__init__(dense_prompt=dense_prompt)
        row = site.architecture
        self.gate_name, self.up_name, self.down_name = row.gate, row.up, row.down
        for name in dict.fromkeys((row.gate, row.up, row.down)):
            self.add_module(name, getattr(site.module, name))
        self.activation = activation or site.activation
        self.set_threshold(self.down.weight.shape[1], self.down.weight)

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

    def _arguments(self, threshold_I: Tensor) -> tuple:
        (gate, gate_bias), (up, up_bias), down = self.gate(), self.up(), self.down
        return gate, up, down.weight.t(), threshold_I, self.activation, gate_bias, up_bias, down.bias

    def by_kernel(self, x_TH: Tensor, threshold_U: Tensor) -> Tensor:
        return sparse_mlp(x_TH, *self._arguments(threshold_U))

    def by_definition(self, x_TH: Tensor, threshold_U: Tensor) -> Tensor:
        return reference(x_TH, *self._arguments(threshold_U))

    def activations(self, x_TH: Tensor) -> Tensor:
        """a = activation(gate(x)), [T, I]."""
        return ACTIVATIONS[self.activation](F.linear(x_TH, *self.gate()))

    def scores(self, x_TH: Tensor) -> Tensor:
        return self.activations(x_TH).abs()

    def weight_bytes(self, kept: float = 1.0) -> int:
        (gate, _), (up, _), down = self.gate(), self.up(), self.down.weight
        small = [parameter for parameter in self.parameters() if parameter.dim() == 1] + [self.threshold]
        return gate.nbytes + round(kept * (up.nbytes + down.nbytes)) + sum(t.nbytes for t in small)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, {super().extra_repr()}"
