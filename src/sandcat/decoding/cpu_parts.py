"""How the parts of a model become the program of a step on a CPU: neighbours are merged, each part has what writes its
records, and a part that has nothing is called as a module between them.

Shapes: B sequences in R rows (see ops/numba/step/linears.py), H hidden size, Q and K numbers of queries and of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sandcat.decoding.cpu_program import Program
from sandcat.decoding.layer_parts import ModelParts
from sandcat.layers.step_parts import (
    Attention,
    GatedNeurons,
    KeptNeurons,
    KeptProduct,
    Linear,
    LowRankProduct,
    Norm,
    Product,
)
from sandcat.ops import FORMATS
from sandcat.ops.numba.paged_attention import fill_pages
from sandcat.ops.numba.primitives.activations import CODES
from sandcat.ops.numba.primitives.matrices import matrix
from sandcat.ops.numba.step import operations, records
from sandcat.ops.weights import Stored


class Sizes(NamedTuple):
    """B, R, H, Q, K, the most neurons that a layer has, and the dtype of the model."""

    batch: int
    rows: int
    H: int
    Q: int
    K: int
    neurons: int
    dtype: torch.dtype


class Place(NamedTuple):
    """What a product reads, and where it goes: it is added to h, or becomes columns of a target."""

    source: int
    """One of the sources of records.py."""
    inputs: int
    outputs: int
    target: Tensor | None = None
    """Float32 [R, ...]; None: h."""
    at: int = 0
    """The first of its columns."""
    norm: Norm | None = None
    """What gives the source, if h after a norm is it."""

    @property
    def fields(self) -> dict[str, Any]:
        """Those of a record."""
        if self.target is None:
            return {}
        return {"target": self.target, "row": self.target.shape[1], "at": self.at}


class Writer:
    """Writes the records of a model's parts."""

    def __init__(self, program: Program, sizes: Sizes, logits: Tensor):
        self.program, self.sizes, self.logits = program, sizes, logits
        self.qkv = torch.zeros(sizes.rows, sizes.Q + 2 * sizes.K)
        self.gates = torch.zeros(2, sizes.rows, 0)
        """Room for gates and ups that are not computed together, where there are such."""
        self.rank = 1
        """The highest one of a low-rank product."""

    def write(self, parts: ModelParts) -> None:
        """The whole step: the embedding, each layer's branches, the last norm and the head."""
        add, H = self.program.add, self.sizes.H
        add(operations.EMBED)
        for layer in parts.layers:
            for norm, part in layer:
                BRANCHES.get(type(part), Writer._called_branch)(self, norm, part)
        norm, head = parts.head
        self._norm(norm)
        if _is_merged(head):
            self.program.fill_linear(self._produce(records.LOGITS, records.X)["linear"], head)
        else:
            self._give(Place(records.X, H, self.logits.shape[1]), head, self.logits.view(self.sizes.batch, 1, -1))
        add(operations.END)

    def _norm(self, norm: Norm) -> None:
        self.program.add(operations.NORM, records.NORMED, weight=norm.weight, eps=norm.eps)

    def _called_branch(self, norm: Norm, part: Any) -> None:
        self._norm(norm)
        self._called(part, Place(records.X, self.sizes.H, self.sizes.H))

    def _attention(self, norm: Norm, part: Attention) -> None:
        _, _, H, Q, K, *_ = self.sizes
        self._norm(norm)
        if all(map(_is_merged, (part.q, part.k, part.v))):
            entry = self.program.add(operations.PROJECT, records.PROJECTED)
            for name, at in (("q", 0), ("k", Q), ("v", Q + K)):
                self.program.fill_linear(entry[name], getattr(part, name), sums_at=at)
        else:
            for at, product, size in ((0, part.q, Q), (Q, part.k, K), (Q + K, part.v, K)):
                self._product(product, Place(records.X, H, size, self.qkv, at, norm))
        entry = self.program.add(
            operations.ATTEND, records.ATTENDED, q_norm=part.q_norm and part.q_norm.weight,
            k_norm=part.k_norm and part.k_norm.weight, head_eps=part.q_norm and part.q_norm.eps,
        )  # fmt: skip
        cached, (B, N, D) = entry["cached"], part.cached.shape
        self.program.pages += fill_pages(cached, part.cached.pages(), part.scaling, part.cached.window, None)
        cached["items"], cached["H"] = B * N, Q // D
        self.program.fill(cached, start=part.cached.start_BN)
        self._product(part.o, Place(records.X, Q, H))

    def _neurons(self, norm: Norm, part: GatedNeurons) -> None:
        """Called as one module if a product of it would have to be: that cuts the program once."""
        gate, up, down, code = part.gate, part.up, part.down, CODES[part.activation]
        if any(_writes(product) == Writer._called for product in (gate, up, down)):
            self._called_branch(norm, part)
            return
        self._norm(norm)
        if _is_merged(gate) and _is_merged(up):
            self._neurons_together(gate, up, activation=code)
        else:
            if not self.gates.numel():
                self.gates = torch.zeros(2, self.sizes.rows, self.sizes.neurons)
            for product, target in zip((gate, up), self.gates, strict=True):
                self._product(product, Place(records.X, self.sizes.H, product.outputs, target, norm=norm))
            self.program.add(
                operations.GATE, records.GATING, gate=self.gates[0], up=self.gates[1], row=self.sizes.neurons,
                activation=code, neurons=gate.outputs,
            )  # fmt: skip
        self._product(down, Place(records.HIDDEN, gate.outputs, self.sizes.H))

    def _kept_neurons(self, norm: Norm, part: KeptNeurons) -> None:
        gate, up, down, kept = part.gate, part.up, part.down, part.kept
        plain = type(up) is type(down) is Product and _is_merged(KeptProduct(down.module, down.stored, kept))
        if not (plain and _is_merged(gate) and _is_merged(up)):
            self._called_branch(norm, part)
            return
        self._norm(norm)
        self._neurons_together(
            gate, up, activation=CODES[part.activation], skips=kept.skips, masks=not kept.skips, shared=kept.shared,
            neuron_threshold=kept.threshold,
        )  # fmt: skip
        entry = self._produce(records.ADD, records.HIDDEN)
        self.program.fill_linear(entry["linear"], down, packed=kept.packed, skips=kept.skips)

    def _neurons_together(self, gate: Linear, up: Linear, **values: Tensor | int | None) -> None:
        entry = self.program.add(operations.NEURONS, records.NEURONAL, neurons=gate.outputs, **values)
        self.program.fill_linear(entry["gate"], gate)
        self.program.fill_linear(entry["up"], up, sums_at=gate.outputs, listed=bool(values.get("skips")))

    def _produce(self, into: int, source: int, **values: Tensor | int) -> Any:
        return self.program.add(operations.PRODUCE, records.PRODUCED, into=into, source=source, **values)

    def _product(self, part: Any, place: Place) -> None:
        _writes(part)(self, part, place)

    def _whole(self, part: Linear, place: Place) -> None:
        into = records.ADD if place.target is None else records.REPLACE
        entry = self._produce(into, place.source, **place.fields)
        self.program.fill_linear(entry["linear"], part)

    def _low_rank(self, part: LowRankProduct, place: Place) -> None:
        """What is kept; what is dropped times the first factor; and that times the other."""
        self._whole(part, place)
        self.rank = max(self.rank, len(part.factor_a))
        entry = self._produce(records.DROPPED, place.source, threshold=part.kept.threshold)
        self.program.fill(entry["linear"], **matrix(Stored(part.factor_a), "dots", tiles=self.program.tiles))
        into = records.ADD if place.target is None else records.ACCUMULATE
        entry = self._produce(into, records.BETWEEN, **place.fields)
        self.program.fill(entry["linear"], **matrix(Stored(part.factor_b), "dots", tiles=self.program.tiles))

    def _called(self, part: Any, place: Place) -> None:
        taken = torch.zeros(self.sizes.batch, 1, place.outputs, dtype=self.sizes.dtype)
        self._give(place, part, taken)
        code = operations.TAKE if place.target is None else operations.FILL
        self.program.add(code, records.MOVED, tensor=taken, size=place.outputs, **place.fields)
        if place.norm is not None:
            self._norm(place.norm)  # each thread has its own x, and the threads may be others now

    def _give(self, place: Place, part: Any, taken: Tensor) -> None:
        given = torch.zeros(self.sizes.batch, 1, place.inputs, dtype=self.sizes.dtype)
        self.program.add(operations.GIVE, records.MOVED, source=place.source, tensor=given, size=place.inputs)
        self.program.call(part.module, given, taken)


BRANCHES: dict[type, Callable[[Writer, Norm, Any], None]] = {
    Attention: Writer._attention, GatedNeurons: Writer._neurons, KeptNeurons: Writer._kept_neurons,
}  # fmt: skip
"""What writes a branch of a layer; the module of any other is called."""
PRODUCTS: dict[type, Callable[[Writer, Any, Place], None]] = {
    Product: Writer._whole, KeptProduct: Writer._whole, LowRankProduct: Writer._low_rank,
}  # fmt: skip
"""What writes a product; the module of any other is called. Those that are one record are merged with neighbours."""


def _writes(part: Any) -> Callable[[Writer, Any, Place], None]:
    """What writes a product, of which the kernel can read the weight as it lies."""
    write = PRODUCTS.get(type(part))
    if write is None or not part.lies or "cpu" not in FORMATS[part.stored.format].devices:
        return Writer._called
    return write


def _is_merged(part: Any) -> bool:
    return _writes(part) == Writer._whole
