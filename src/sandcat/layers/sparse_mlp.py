"""The gated MLPs of a sparsified model. Shapes: see ops/sparse_mlp.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sandcat.layers.op_module import Kernel
from sandcat.layers.sparse_module import Batch, Sparse, Thresholded
from sandcat.layers.step_parts import Called, KeptNeurons, Part, part_of
from sandcat.layers.stored_linear import StoredLinear
from sandcat.layers.weights import stored_of
from sandcat.models.view import Site
from sandcat.ops.activations import ACTIVATIONS
from sandcat.ops.shared_units import reference_up_down as reference_shared
from sandcat.ops.shared_units import shared_units, shared_up_down
from sandcat.ops.sparse_mlp import reference, reference_up_down, sparse_mlp, sparse_up_down
from sandcat.ops.weights import Stored, product


class GatedMLP(Sparse):
    """Takes over the projections of a dense gated MLP, under their checkpoint names.

    Args:
        site: the dense MLP. Its linear layers are shared, not copied; on the meta device too. They may be
            `StoredLinear`s.
        activation: a name of `ops.sparse_mlp.ACTIVATIONS`; default the model's own.
        options: of `Sparse`.
    """

    def __init__(self, site: Site, *, activation: str | None = None, **options):
        super().__init__(**options)
        row = site.architecture
        self.gate_name, self.up_name, self.down_name = row.gate, row.up, row.down
        for name in dict.fromkeys((row.gate, row.up, row.down)):
            self.add_module(name, getattr(site.module, name))
        self.activation = activation or site.activation

    @property
    def down(self) -> nn.Linear | StoredLinear:
        return self.get_submodule(self.down_name)

    @property
    def adapted(self) -> bool:
        """Whether a projection has to be called: an adapter is around it, or a hook brings its weights (accelerate)."""
        return any(
            hasattr(linear, "_hf_hook") or not (type(linear) is nn.Linear or isinstance(linear, Kernel))
            for linear in self.children()
        )

    def _half(self, name: str, half: int) -> Stored:
        stored = stored_of(self.get_submodule(name))
        if self.gate_name != self.up_name:
            return stored
        neurons = len(stored.codes) // 2  # one fused matrix: gate rows, then up rows
        return stored.rows(slice(half * neurons, (half + 1) * neurons))

    def gate(self) -> Stored:
        """The matrix [I, H] of the gate projection, a view where it is fused."""
        return self._half(self.gate_name, 0)

    def up(self) -> Stored:
        """The matrix [I, H] of the up projection."""
        return self._half(self.up_name, 1)

    @property
    def format(self) -> str:  # type: ignore[override]  # of others it is known when they are made
        return next((f for linear in self.children() if (f := stored_of(linear).format) != "float"), "float")

    @property
    def dtype(self) -> torch.dtype:
        return stored_of(self.down).like.dtype

    @property
    def size(self) -> int:
        return self.down.weight.numel()

    def dense(self, x: Tensor) -> Tensor:
        """With all neurons; a gate that is itself sparse decides for itself."""
        if self.gate_name == self.up_name:
            gate, up = self.get_submodule(self.gate_name)(x).chunk(2, -1)
        else:
            gate, up = self.get_submodule(self.gate_name)(x), self.get_submodule(self.up_name)(x)
        return product(ACTIVATIONS[self.activation](gate) * up, stored_of(self.down))

    @property
    def skipped(self) -> nn.Parameter:
        return self.down.weight

    def extra_repr(self) -> str:
        return f"activation={self.activation}, {super().extra_repr()}"


class SparseMLP(GatedMLP, Thresholded):
    """Has one threshold a neuron, for what its gate gives. The gate projection may be a `SparseLinear`.

    Args: see `GatedMLP` and `Thresholded`.
    """

    shared_op = "shared_up_down"

    def __init__(self, site: Site, *, activation: str | None = None, dense_prompt: bool = False, batch: Batch = "own"):
        super().__init__(site, activation=activation, dense_prompt=dense_prompt, batch=batch)
        self.set_threshold(self.down.in_features, stored_of(self.down).like)

    def run(self, x: Tensor) -> Tensor:
        return self.by_parts(x) if self.adapted else super().run(x)

    def by_parts(self, x: Tensor) -> Tensor:
        """The same by calling each projection, with whatever stands around it: masked, and nothing is skipped."""
        if self.gate_name == self.up_name:
            gate, up = self.get_submodule(self.gate_name)(x).chunk(2, -1)
        else:
            gate, up = self.get_submodule(self.gate_name)(x), self.get_submodule(self.up_name)(x)
        a = self.in_parts(ACTIVATIONS[self.activation](gate), lambda whole: whole, self.masked)
        return self.down(a * up)

    def masked(self, a: Tensor) -> Tensor:
        """Activations with those of dropped neurons set to 0."""
        shares = self.shares(a)
        return torch.where(~shared_units(a.abs(), self.threshold) if shares else a.abs() <= self.threshold, 0, a)

    @property
    def op(self) -> str:  # type: ignore[override]  # of the others it is known without looking at the gate
        return "sparse_up_down" if self._gate_skips() else "sparse_mlp"

    def _gate_skips(self) -> bool:
        """Whether the gate projection is itself sparse, and so runs by its own op."""
        return isinstance(self.get_submodule(self.gate_name), Sparse)

    def by_kernel(self, x: Tensor) -> Tensor:
        return self._run(x, sparse_mlp, sparse_up_down, shared_up_down, flat=True)

    def by_definition(self, x: Tensor) -> Tensor:
        return self._run(x, reference, reference_up_down, reference_shared)

    def _run(self, x: Tensor, whole: Callable, own: Callable, shared: Callable, *, flat: bool = False) -> Tensor:
        shares, given = self.shares(x), None
        if shares or self._gate_skips():
            given = self.activations(x)
        if flat:
            x, given = x.flatten(0, -2), None if given is None else given.flatten(0, -2)
        up, down = self.up(), stored_of(self.down)
        if given is not None:
            return (shared if shares else own)(x, given, up, down, self.threshold)
        return whole(x, self.gate(), up, down, self.threshold, self.activation)

    def activations(self, x: Tensor) -> Tensor:
        """a = activation(gate(x)), [..., I]."""
        fused = self.gate_name == self.up_name
        g = product(x, self.gate()) if fused else self.get_submodule(self.gate_name)(x)
        return ACTIVATIONS[self.activation](g)

    def scores(self, x: Tensor) -> Tensor:
        return self.activations(x).abs()

    def step_part(self, x: Tensor) -> Part:
        if self.gate_name == self.up_name:
            return Called(self)
        gate, up, down = (part_of(self.get_submodule(n), x) for n in (self.gate_name, self.up_name, self.down_name))
        return KeptNeurons(self, gate, up, down, self.activation, self.kept_in_step(x))

    def weight_bytes(self, kept: float = 1.0) -> int:
        up, down = self.up(), stored_of(self.down)
        always = self.threshold.nbytes + up.small_bytes() + down.small_bytes()
        if not self._gate_skips():  # else it counts its own
            always += self.gate().codes.nbytes + self.gate().small_bytes()
        return always + round(kept * (up.codes.nbytes + down.codes.nbytes))
