"""The fused step of one sequence on CUDA, five kernels a layer. The kernels are in ops/triton; see step.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from torch import Tensor

from sandcat.decoding.fused_gpu_common import alike, codes_of, format_of, kind_of, tiles
from sandcat.decoding.fused_gpu_products import JOIN_HEADS, PRODUCTS, GpuProducts, Products
from sandcat.layers.cache import PagedCache
from sandcat.layers.step_parts import Attention, GatedNeurons, KeptNeurons, KeptProduct, Norm, Product
from sandcat.models.view import ModelView
from sandcat.ops.triton import sparse_mlp, step
from sandcat.ops.triton.primitives.arguments import Source
from sandcat.ops.triton.primitives.pages import New


class GpuStep(GpuProducts):
    """The step of one sequence on CUDA; see `DecodeStep`. Five kernels a layer; more where neighbours are not of one
    kind, and two more for kept neurons under `torch.use_deterministic_algorithms`, where all sums have a fixed order.
    """

    def __init__(self, view: ModelView, cache: PagedCache):
        super().__init__(view, cache)
        parts = [part for layer in self.layers for _, part in layer if type(part) is Attention]
        self.cached = {part: part.cached.contiguous() for part in parts}

    def run(self, ids_B1: Tensor) -> Tensor:
        self.embed(ids_B1)
        for layer in self.layers:
            for norm, part in layer:
                BRANCHES.get(type(part), GpuStep._called_branch)(self, norm, part)
        self._project(self.norm, [self.head], [len(self.logits)], self.logits, self.position)
        return self.logits[None]

    def _attention(self, norm: Norm, part: Attention) -> None:
        rows = [self.Q, self.K, self.K]
        self._project(norm, [part.q, part.k, part.v], rows, self.qkv)
        joins = PRODUCTS.get(kind_of(part.o)) in JOIN_HEADS
        self.attend(part, [y[None] for y in self.qkv.split(rows)], None if joins else self.attended)
        self._add(self.attending.acc if joins else self.attended, part.o, zeros=self.sums)

    def attend(self, part: Attention, qkv: Iterable[Tensor], out: Tensor | None) -> None:
        """out = what the rows of q, k and v [B, ...] attend to; without it parts of that, in `attending`."""
        (q, k, v), G, (keys, values) = qkv, self.Q // self.K, self.cached[part]
        programs = self.kv_heads * self.splits
        config = step.attend_config(
            G, self.D, keys.element_size(), self.max_length, self.splits, programs > self.multiprocessors
        )
        step.attend[(self.kv_heads, self.splits)](
            q, q.stride(0), New(k, v, k.stride(0), v.stride(0)), self.turn_of(part), keys, values, part.scaling,
            self.attending, out, self.max_length, self.kv_heads, G, self.D, part.cached.window, **config,
            **self.dependent,
        )  # fmt: skip

    def _neurons(self, norm: Norm, part: GatedNeurons) -> None:
        gate, up, down, code = part.gate, part.up, part.down, sparse_mlp.CODES[part.activation]
        if not all(kind_of(p) in PRODUCTS for p in (gate, up, down)):
            self._called_branch(norm, part)  # as one module, if a product of it would have to be
        elif alike(gate) == alike(up) and kind_of(up) == (Product, "float"):
            (w_gate, *_, gate_bias, _), (w_up, *_, up_bias, _) = gate.stored, up.stored
            config, grid = self.whole_rows(w_gate, matrices=2)
            step.gate_up[grid](
                self.h, *norm, w_gate, w_up, gate_bias, up_bias, self.hidden, gate.outputs, self.H, CODE=code,
                **config, **self.dependent,
            )  # fmt: skip
            self._add(self.hidden, down)
        else:
            self._project(norm, [gate, up], [gate.outputs, up.outputs], self.gate_up)
            self._add(self.gate_up[gate.outputs :], down, gate=self.gate_up, code=code)

    def _kept_neurons(self, norm: Norm, part: KeptNeurons) -> None:
        """gate, and the list of the neurons to keep; then their up and down."""
        gate, up, down = part.gate, part.up, part.down
        by_inputs = KeptProduct(down.module, down.stored, part.kept) if type(down) is Product else down
        plain = type(up) is type(down) is Product and down.stored.bias is None
        if not (plain and type(gate) in GATES and all(kind_of(p) in PRODUCTS for p in (gate, up, by_inputs))):
            self._called_branch(norm, part)
            return
        GATES[type(gate)](self, norm, part)
        sparse_mlp.up_down(self.x_normed, up.stored, down.stored, self.count, self.list_n, self.a_n, self.h, self.parts)

    def _whole_gate(self, norm: Norm, part: KeptNeurons) -> None:
        gate = part.gate
        config = sparse_mlp.gate_config(gate.stored.codes.element_size())
        sparse_mlp.gate_kernel[(tiles(gate.outputs, config["ROWS"]),)](
            Source(self.h, None, *norm), *codes_of([gate]), gate.stored.bias, gate.stored.scale,
            self.listed(part.kept.threshold), self.x_normed, gate.outputs, self.H, FORMAT=format_of([gate]),
            CODE=sparse_mlp.CODES[part.activation], **config, **self.dependent,
        )  # fmt: skip

    def _kept_gate(self, norm: Norm, part: KeptNeurons) -> None:
        products = Products([part.gate], self.h, None, norm, code=sparse_mlp.CODES[part.activation])
        self.sparse_rows(products, neurons=self.listed(part.kept.threshold), taken=self.x_normed)

    def _called_branch(self, norm: Norm, part: Any) -> None:
        self.h.add_(part.module(self.normed(self.h, norm)).view(-1))

    def _project(self, norm: Norm, parts: list, rows: list[int], out: Tensor, position: Tensor | None = None) -> None:
        """out = the products of so many rows with the normed h, one after another; neighbours of one kind at once."""
        start = 0
        for kind, group in groupby(zip(parts, rows, strict=True), lambda pair: alike(pair[0])):
            these, counts = zip(*group, strict=True)
            y = out[start : start + sum(counts)]
            start += sum(counts)
            run = PRODUCTS.get(kind[:2], GpuStep.called)
            run(self, Products(list(these), self.h, y, norm, position=position))

    def _add(
        self, x: Tensor, part: Any, *, gate: Tensor | None = None, code: int = 0, zeros: Tensor | None = None
    ) -> None:
        """h += the product with x, or with act(gate) * x; and zeros = 0."""
        run = PRODUCTS.get(kind_of(part), GpuStep.called)
        run(self, Products([part], x, self.h, gate=gate, code=code, zeros=zeros))


BRANCHES: dict[type, Callable[[GpuStep, Norm, Any], None]] = {
    Attention: GpuStep._attention, GatedNeurons: GpuStep._neurons, KeptNeurons: GpuStep._kept_neurons,
}  # fmt: skip
"""What runs a branch of a layer; any other is called as a module."""
GATES: dict[type, Callable[[GpuStep, Norm, KeptNeurons], None]] = {
    Product: GpuStep._whole_gate, KeptProduct: GpuStep._kept_gate,
}  # fmt: skip
"""What runs the gate of kept neurons, and lists them."""
