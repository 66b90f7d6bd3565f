"""The fused step of 2 to 16 sequences on CUDA. Layers that skip, and those whose weights are codes, run by kernels that
read a weight once for all sequences and add to the residual state themselves; dense ones by PyTorch's products, which
the next norm adds to it. The kernels are in ops/triton; see step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sandcat.decoding.fused_gpu_common import (
    READ,
    GpuStepBase,
    alike,
    codes_of,
    format_of,
    kind_of,
    tiles,
    zeros_of,
)
from sandcat.layers.cache import PagedCache
from sandcat.layers.step_parts import Attention, GatedNeurons, KeptProduct, LowRankProduct, Norm, Product
from sandcat.models.view import ModelView
from sandcat.ops.checks import MAX_TOKENS
from sandcat.ops.triton import paged_attention, sparse_linear_batch, step, stored_linear
from sandcat.ops.triton.primitives import blocks, page_grid
from sandcat.ops.triton.primitives.arguments import Zeros, three, three_sizes
from sandcat.ops.triton.primitives.pages import New


def applies(batch: int) -> bool:
    """Whether `GpuBatchStep` runs so many sequences: it adds up in any order."""
    return batch <= MAX_TOKENS and not torch.are_deterministic_algorithms_enabled()


class Products(NamedTuple):
    """Up to three products with one input, which go into y, one after another.

    They are added to y if they `add`; else y is zero before.
    """

    parts: list
    x: Tensor
    y: Tensor
    gate: Tensor | None = None
    """The input is act(gate) * x."""
    code: int = 0
    """Of that activation."""
    add: bool = False


class GpuBatchStep(GpuStepBase):
    """The step of B sequences on CUDA; see `DecodeStep`."""

    def __init__(self, view: ModelView, cache: PagedCache):
        super().__init__(view, cache)
        self.x = self.buffer(self.B, 1, self.H)
        self.qkv, self.gate_up = self.floats(self.B, self.Q + 2 * self.K), self.floats(self.B, 2 * self.neurons)
        self.digits = self.buffer(self.B, 4 * max(self.neurons, self.H, self.Q), dtype=torch.int8)  # bytes of a number
        self.back = self.floats(self.B)
        parts = [part for layer in self.layers for _, part in layer if type(part) is Attention]
        self.cached = {part: page_grid.cached_of(part.cached.pages()) for part in parts}
        self.grid = page_grid.grid_of(self.Q // self.D, 1, parts[0].cached.pages(), self.multiprocessors)
        self.sums = page_grid.room_of(self.grid, self.device)
        self.first_B = torch.arange(self.B + 1, dtype=torch.int32, device=self.device)
        self.due: Tensor | None = None  # [B, H], a product that is still to be added to h

    def run(self, ids_B1: Tensor) -> Tensor:
        self.embed(ids_B1)
        for layer in self.layers:
            for norm, part in layer:
                BRANCHES.get(type(part), GpuBatchStep._called_branch)(self, norm, part)
        self._normalize(self.norm, position=self.position)
        return self._called(self.head, self.x)

    def _called_branch(self, norm: Norm, part: Any) -> None:
        self._normalize(norm)
        self.due = self._called(part, self.x)

    def _called(self, part: Any, x_B1I: Tensor) -> Tensor:
        """What a part gives that has no launcher, by its module, [B, ...]."""
        return part.module(x_B1I)[:, 0].contiguous()

    def _attention(self, norm: Norm, part: Attention) -> None:
        parts = [part.q, part.k, part.v]
        self._normalize(norm, self.qkv if any(map(self._kind, parts)) else None)
        self._attend(part, *self._project(parts))
        self._add(self.attended, part.o)

    def _attend(self, part: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
        """attended = what the rows of q, k and v [B, ...] attend to; k and v are cached."""
        paged_attention.attend[(self.grid.programs,)](
            q, self.attended, self.first_B, self.cached[part], self.turn_of(part),
            New(k, v, k.stride(0), v.stride(0)), self.sums, q.stride(0),
            *page_grid.scalings(part.scaling, None), self.grid.items, part.cached.window, **self.grid.config,
            **self.dependent,
        )  # fmt: skip

    def _kind(self, part: Any) -> tuple | None:
        """What products of one launch have in common; None: they run as modules, as where no kernel pays."""
        if kind_of(part) not in PRODUCTS or not part.module.pays(self.x):
            return None
        kept = getattr(part, "kept", None)
        return *alike(part), kept is not None and kept.shared

    def _normalize(self, norm: Norm, zeros: Tensor | None = None, position: Tensor | None = None) -> None:
        """h += what is due; x = h after the norm; and zeros = 0."""
        filled, share = zeros_of(zeros, self.B)
        step.normalize[(self.B,)](
            self.h, self.due, *norm, self.x, filled, position, self.H, ZEROS=share,
            **step.normalize_config(self.H), **self.dependent,
        )  # fmt: skip
        self.due = None

    def _project(self, parts: list) -> list[Tensor]:
        """The products of q, k and v with x, [B, ...] each; neighbours of one kind at once."""
        found, start = [], 0
        for kind, group in groupby(zip(parts, [self.Q, self.K, self.K], strict=True), lambda pair: self._kind(pair[0])):
            these, counts = zip(*group, strict=True)
            y = self.qkv[:, start : start + sum(counts)]
            start += sum(counts)
            if kind is None:
                found += [self._called(part, self.x) for part in these]
            else:
                PRODUCTS[kind[:2]](self, Products(list(these), self.x[:, 0], y))
                found += y.split(counts, 1)
        return found

    def _add(self, x: Tensor, part: Any, gate: Tensor | None = None, code: int = 0) -> None:
        """h += the product with x, or, where a kernel runs it, with act(gate) * x."""
        if kind := self._kind(part):
            PRODUCTS[kind[:2]](self, Products([part], x, self.h, gate, code, add=True))
        else:
            self.due = self._called(part, x[:, None])

    def _neurons(self, norm: Norm, part: GatedNeurons) -> None:
        gate, up, down, code = part.gate, part.up, part.down, blocks.CODES[part.activation]
        kind = self._kind(gate)
        if kind is None or kind != self._kind(up):
            self._normalize(norm)
            self._add(self._gate_times_up(self._called(gate, self.x), self._called(up, self.x), code), down)
            return
        gate_up = self.gate_up[:, : 2 * gate.outputs]
        self._normalize(norm, self.gate_up)
        PRODUCTS[kind[:2]](self, Products([gate, up], self.x[:, 0], gate_up))
        g, u = gate_up.chunk(2, 1)
        if self._kind(down):
            self._add(u, down, gate=g, code=code)
        else:
            self._add(self._gate_times_up(g, u, code), down)

    def _gate_times_up(self, g: Tensor, u: Tensor, code: int) -> Tensor:
        """act(g) * u, [B, I]."""
        y = torch.empty(g.shape, dtype=self.dtype, device=self.device)
        step.gate_times_up[(tiles(g.shape[1], 1024), self.B)](
            g, u, y, g.stride(0), u.stride(0), g.shape[1], CODE=code, BLOCK=1024, **self.dependent
        )  # fmt: skip
        return y

    def _listed_rows(self, products: Products) -> None:
        parts, x, y, gate, code, _ = products
        K = parts[0].inputs
        config, (across, splits) = sparse_linear_batch.listed_rows_config(
            [part.outputs for part in parts], K, self.dtype.itemsize, self.multiprocessors
        )
        room = len(parts) * splits * config["CHANNELS"]
        list_n, count = (self.room(name, size, torch.int32) for name, size in (("list", room), ("count", room)))
        x_tn = self.room("x_tn", sparse_linear_batch.TOKENS * room, self.dtype)
        sparse_linear_batch.list_channels[(splits, len(parts))](
            x, x.stride(0), gate, three(p.kept.threshold for p in parts), list_n, x_tn, count, room, Zeros(), self.B,
            K, CODE=code, SHARED=parts[0].kept.shared, ZEROS=1,
            **sparse_linear_batch.list_channels_config(config["CHANNELS"], self.B), **self.dependent,
        )  # fmt: skip
        sparse_linear_batch.listed_rows[(across, splits)](
            list_n, x_tn, count, room, three(codes.t() for codes in codes_of(parts)),
            three(p.stored.bias for p in parts), three(p.stored.scale for p in parts),
            three_sizes(part.outputs for part in parts), y, y.stride(0), self.B, FORMAT=format_of(parts), **config,
            **self.dependent,
        )  # fmt: skip

    def _low_rank(self, products: Products) -> None:
        """Products of what is kept, and then of what is dropped, by two factors."""
        if products.gate is not None:
            x = self._gate_times_up(products.gate, products.x, products.code)
            products = products._replace(x=x, gate=None)
        parts, x, y, *_ = products
        self._listed_rows(products._replace(parts=[part.without for part in parts]))
        for part, out in zip(parts, y.split([part.outputs for part in parts], 1), strict=True):
            dropped = torch.where(x.abs() <= part.kept.threshold, x, 0)
            out.add_(F.linear(F.linear(dropped, part.factor_a), part.factor_b))

    def _coded_rows(self, products: Products) -> None:
        parts, x, y, gate, code, add = products
        K, format, rows = parts[0].inputs, parts[0].stored.format, [part.outputs for part in parts]
        digits = self.digits.view(stored_linear.digits_dtype(format))
        config, grid = stored_linear.coded_rows_config(format, rows, K, self.device, K, self.B)
        stored_linear.write_digits[(self.B,)](
            x, x.stride(0), gate, digits, self.back, Zeros(), K, CODE=code, DTYPE=self.tl_dtype,
            ZEROS=1, **stored_linear.write_digits_config(format, K), **self.dependent,
        )  # fmt: skip
        stored_linear.coded_rows[grid](
            None, three(codes_of(parts)), three(p.stored.bias for p in parts), three(p.stored.scale for p in parts),
            three_sizes(rows), y, y.stride(0), Zeros(), None, digits, self.back, K, self.B,
            CODE=0, DTYPE=self.tl_dtype, ADD=add, SHARED=grid[1] > 1, ZEROS=1, **config, **self.dependent,
        )  # fmt: skip


BRANCHES: dict[type, Callable[[GpuBatchStep, Norm, Any], None]] = {
    Attention: GpuBatchStep._attention, GatedNeurons: GpuBatchStep._neurons,
}  # fmt: skip
"""What runs a branch of a layer; any other runs as a module."""
PRODUCTS: dict[tuple, Callable[[GpuBatchStep, Products], None]] = {
    **{(Product, format): GpuBatchStep._coded_rows for format in READ if format != "float"},
    **{(KeptProduct, format): GpuBatchStep._listed_rows for format in READ},
    **{(LowRankProduct, format): GpuBatchStep._low_rank for format in READ},
}
"""What runs products, by their part and the format of their weights; any other, as dense ones, run as modules."""
