"""What runs the products of a fused step of one sequence on CUDA, by their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sandcat.decoding.fused_gpu_common import (
    READ,
    GpuStepBase,
    codes_of,
    format_of,
    tiles,
    zeros_of,
)
from sandcat.layers.cache import PagedCache
from sandcat.layers.step_parts import KeptProduct, LowRankProduct, Norm, Product
from sandcat.models.view import ModelView
from sandcat.ops.triton import low_rank, sparse_linear, sparse_mlp, step, stored_linear
from sandcat.ops.triton.primitives.arguments import Heads, Lists, Neurons, Source, Zeros, three, three_sizes
from sandcat.ops.triton.primitives.pages import Room


class Products(NamedTuple):
    """Up to three products with one input, which go into y, one after another.

    They are added to y without a norm; with one, y is what they are, and zero before (but for the logits).
    """

    parts: list
    x: Tensor
    y: Any
    """None where they go into a list of neurons."""
    norm: Norm | None = None
    """The input is x after this norm."""
    gate: Tensor | None = None
    """The input is act(gate) * x."""
    code: int = 0
    """Of that activation."""
    zeros: Tensor | None = None
    """What to fill with zeros besides."""
    position: Tensor | None = None
    """With it they are the logits, the last of a step: it goes on by one."""


class GpuProducts(GpuStepBase):
    """Runs products, and has the buffers that they go through."""

    def __init__(self, view: ModelView, cache: PagedCache):
        super().__init__(view, cache)
        self.h, self.attended = self.h[0], self.attended[0]
        heads, size = self.Q // self.D, self.D
        self.splits = step.attend_splits(self.kv_heads, self.max_length, self.multiprocessors)
        self.attending = Room(
            self.floats(heads, self.splits),
            self.floats(heads, self.splits),
            self.floats(heads, self.splits, size),
            self.buffer(self.kv_heads, dtype=torch.int32),
        )
        neurons, qkv = self.neurons, self.Q + 2 * self.K
        self.x_normed, self.hidden = self.buffer(self.H), self.buffer(neurons)
        self.logits = self.buffer(self.vocabulary)
        self.sums = self.floats(qkv + 2 * neurons + 1)
        self.qkv, self.gate_up, count = self.sums.split([qkv, 2 * neurons, 1])
        self.count, self.list_n = count.view(torch.int32), self.buffer(neurons, dtype=torch.int32)
        self.a_n, self.parts = self.floats(neurons), sparse_mlp.parts_like(self.h)
        self.ordered = torch.are_deterministic_algorithms_enabled()

    def listed(self, threshold: Tensor) -> Neurons:
        """The list of the neurons above these thresholds."""
        return Neurons(threshold, self.list_n, self.a_n, self.count if self.parts is None else None)

    def called(self, products: Products) -> None:
        """Products that have no launcher, by their modules."""
        parts, x, y, norm, _, _, zeros, position = products
        given = x.view(1, 1, -1) if norm is None else self.normed(x, norm)
        found = torch.cat([part.module(given).view(-1) for part in parts])
        if norm is None:
            y.add_(found)
        else:
            y.copy_(found)
        if zeros is not None:
            zeros.zero_()
        if position is not None:
            position.add_(1)

    def normed(self, x: Tensor, norm: Norm) -> Tensor:
        """x after a norm, as modules take it, [1, 1, H]."""
        step.normalize[(1,)](
            x, None, *norm, self.x_normed, Zeros(), None, self.H, ZEROS=1, **step.normalize_config(self.H),
            **self.dependent,
        )  # fmt: skip
        return self.x_normed.view(1, 1, -1)

    def all_rows(self, products: Products) -> None:
        weights, biases = ([getattr(p.stored, name) for p in products.parts] for name in ("codes", "bias"))
        config, grid = self.whole_rows(weights[0])
        if products.norm is not None:
            step.project[grid](
                products.x, *products.norm, three(weights), three(biases),
                three_sizes(part.outputs for part in products.parts), products.y, products.position, self.H, **config,
                **self.dependent,
            )  # fmt: skip
        else:
            zeros, share = zeros_of(products.zeros, grid[0])
            step.add_rows[grid](
                products.x, products.gate, *weights, *biases, products.y, zeros, *weights[0].shape,
                CODE=products.code, DTYPE=self.tl_dtype, ZEROS=share, **config, **self.dependent,
            )  # fmt: skip

    def whole_rows(self, weight: Tensor, matrices: int = 1) -> tuple[dict, tuple[int]]:
        """Shape and number of the programs that read the rows of a matrix (or of two alike) in turn."""
        config = step.whole_rows_config(weight.shape[1], weight.element_size(), matrices)
        return config, (self.multiprocessors * config.pop("per_multiprocessor"),)

    def sparse_rows(self, products: Products, neurons: Neurons | None = None, taken: Tensor | None = None) -> None:
        """
        Args:
            neurons: whose gate the products are: they go into this list, not to y.
            taken: what the input is written to, in the model's dtype.
        """
        parts, x, y, norm, gate, code, sums, position = products
        channels, itemsize = parts[0].inputs, parts[0].stored.codes.element_size()
        columns = [part.outputs for part in parts]
        config, grid = sparse_linear.sparse_rows_config(columns, channels, itemsize, self.multiprocessors)
        programs, heads = grid[0] * grid[1], Heads()
        if x is self.attending.acc:
            heads = Heads(self.attending.top, self.attending.sum, self.D)
        zeros, share = zeros_of(sums, programs)
        ordered = self.ordered or y is None or y.dtype != torch.float32 or position is not None
        partial = arrived = None
        if ordered:
            partial = self.room("parts", grid[1] * sum(columns), torch.float32)
            arrived = self.room("arrived", grid[0], torch.int32)
        sparse_linear.sparse_rows[grid](
            Source(x, gate, *(norm or ())), heads, three(codes.t() for codes in codes_of(parts)),
            three(p.kept.threshold for p in parts), three(p.stored.bias for p in parts),
            three(p.stored.scale for p in parts), three_sizes(columns), Lists(
                self.room("list_i", programs * config["CHANNELS"], torch.int32),
                self.room("list_x", programs * config["CHANNELS"], torch.float32), partial, arrived,
            ), y, zeros, neurons or Neurons(), taken, position, channels, FORMAT=format_of(parts), CODE=code,
            ADD=position is None, ORDERED=ordered, HEAD_PARTS=self.splits if heads.size else 0, ZEROS=share,
            **config, **self.dependent,
        )  # fmt: skip

    def coded_rows(self, products: Products) -> None:
        """They are added to zeroes where y is float32."""
        parts, x, y, norm, gate, code, sums, position = products
        rows, columns = [part.outputs for part in parts], parts[0].inputs
        most = columns if position is None else 1  # programs that may add to one sum: the logits are not zeroed
        if self.ordered:
            most = min(most, 1 if norm is None else 2)  # two added to zero are the same in any order
        config, grid = stored_linear.coded_rows_config(parts[0].stored.format, rows, columns, x.device, most)
        programs = grid[0] * grid[1]
        zeros, share = zeros_of(sums, programs)
        stored_linear.coded_rows[grid](
            Source(x, gate, *(norm or ())), three(codes_of(parts)), three(p.stored.bias for p in parts),
            three(p.stored.scale for p in parts), three_sizes(rows), y, 0, zeros, position,
            self.room("digits", programs * config["SLICE"], torch.int32), None, columns, 1, CODE=code,
            DTYPE=self.tl_dtype, ADD=norm is None, SHARED=grid[1] > 1, ZEROS=share, **config, **self.dependent,
        )  # fmt: skip

    def low_rank_rows(self, products: Products) -> None:
        """What is kept; for each, what is dropped times the first factor; and that times the other."""
        parts, x, y, norm, gate, *_ = products
        taken = self.x_normed if norm else None if gate is None else self.hidden
        if x is self.attending.acc:
            taken = self.attended
        self.sparse_rows(products._replace(parts=[part.without for part in parts]), taken=taken)
        for part, out in zip(parts, y.split([part.outputs for part in parts]), strict=True):
            rank, channels = part.factor_a.shape
            between = self.room("between", rank, self.dtype)
            config = step.whole_rows_config(channels, part.factor_a.element_size())
            del config["per_multiprocessor"]
            low_rank.dropped_rows[(tiles(rank, config["ROWS"]),)](
                x if taken is None else taken, part.kept.threshold, part.factor_a, between, rank, channels, **config,
                **self.dependent,
            )  # fmt: skip
            config, grid = self.whole_rows(part.factor_b)
            step.add_rows[grid](
                between, None, part.factor_b, None, out, Zeros(), *part.factor_b.shape, CODE=0, DTYPE=self.tl_dtype,
                ZEROS=1, **config, **self.dependent,
            )  # fmt: skip


PRODUCTS: dict[tuple, Callable[[GpuProducts, Products], None]] = {
    **{(Product, format): GpuProducts.coded_rows for format in READ},
    (Product, "float"): GpuProducts.all_rows,
    **{(KeptProduct, format): GpuProducts.sparse_rows for format in READ},
    **{(LowRankProduct, format): GpuProducts.low_rank_rows for format in READ},
}
"""What runs products, by their part and the format of their weights; any other is called as a module."""
JOIN_HEADS = (GpuProducts.sparse_rows, GpuProducts.low_rank_rows)
"""Those that add up themselves what the parts of heads attended to: their x is `acc`, where others' is `attended`."""
