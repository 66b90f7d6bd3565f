"""The fused step of 2 to 16 sequences on CUDA. Layers that skip, and those whose weights are codes, run by kernels that
read a weight once for all sequences and add to the residual state themselves; dense ones by PyTorch's products, which
the next norm adds to it. The kernels are in ops/triton; see step.py.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor, nn

from sandcat.decoding.fused_gpu_common import Parts, format_of, projections, share_of, sizes, three, tiles
from sandcat.decoding.static_cache import DecodeCache
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.stored_linear import StoredLinear
from sandcat.layers.weights import stored_of
from sandcat.models.view import Block, ModelView
from sandcat.ops.checks import MAX_TOKENS
from sandcat.ops.triton import sparse_linear_batch, step, stored_linear
from sandcat.ops.triton.primitives import blocks, launch


def applies(batch: int) -> bool:
    """Whether `GpuBatchStep` runs so many sequences: it adds up in any order."""
    return 1 < batch <= MAX_TOKENS and not torch.are_deterministic_algorithms_enabled()


class GpuBatchStep(Parts):
    """The step of B sequences on CUDA; see `Step`."""

    def __init__(self, view: ModelView, blocks: list[Block], cache: DecodeCache):
        super().__init__(view, blocks, cache)
        self.x = self.buffer(self.B, 1, self.H)
        self.qkv, self.gate_up = self.floats(self.B, self.Q + 2 * self.K), self.floats(self.B, 2 * self.neurons)
        self.digits = self.buffer(self.B, 4 * max(self.neurons, self.H, self.Q), dtype=torch.int8)  # bytes of a number
        self.back = self.floats(self.B)
        self.due: Tensor | None = None  # [B, H], a product that is still to be added to h

    def __call__(self, ids_B1: Tensor) -> Tensor:
        self.embed(ids_B1)
        for block, cached in self.layers:
            attention = [block.q, block.k, block.v]
            self._normalize(block.input_norm, self.qkv if any(map(self._kind, attention)) else None)
            q, k, v = self._project(attention)
            self.attend(block, cached.keys, cached.values, q, k, v, self.attended)
            self._add(self.attended, block.o)
            self._mlp(block)
        self._normalize(self.norm, position=self.position)
        return self.head(self.x)[:, 0]

    def _kind(self, linear: nn.Module) -> tuple | None:
        """What runs a layer here, the kernels of "own" or "shared" lists or of "all" rows, and what else layers of one
        launch have in common; None: the layer itself."""
        if type(linear) not in (SparseLinear, StoredLinear) or not linear.pays(self.x):
            return None
        lists = "shared" if type(linear) is SparseLinear and linear.shares(self.x) else "own"
        return "all" if type(linear) is StoredLinear else lists, stored_of(linear).format, linear.bias is None

    def _normalize(self, norm: nn.Module, zeros: Tensor | None = None, position: Tensor | None = None) -> None:
        """h += what is due; x = h after the norm; and zeros = 0."""
        step.normalize[(self.B,)](
            self.h, self.due, norm.weight, norm.variance_epsilon, self.x, zeros, 0 if zeros is None else zeros.numel(),
            position, self.H, ZEROS=share_of(zeros, self.B), **step.normalize_config(self.H), **self.dependent,
        )  # fmt: skip
        self.due = None

    def _project(self, linears: list[nn.Module]) -> list[Tensor]:
        """The products of q, k and v with x, [B, ...] each; neighbours of one kind at once."""
        found, start = [], 0
        for kind, group in groupby(linears, self._kind):
            alike = list(group)
            out = self.qkv[:, start:]
            start += sum(linear.out_features for linear in alike)
            if kind is None:
                found += [linear(self.x)[:, 0] for linear in alike]
            else:
                self._rows(kind, self.x[:, 0], alike, out)
                found += out[:, : sum(sizes(alike))].split([linear.out_features for linear in alike], 1)
        return found

    def _add(self, x: Tensor, linear: nn.Module, gate: Tensor | None = None, code: int = 0) -> None:
        """h += the layer's product with x, or, where a kernel runs it, with act(gate) * x."""
        if (kind := self._kind(linear)) is None:
            self.due = linear(x[:, None])[:, 0]
        else:
            self._rows(kind, x, [linear], self.h, gate=gate, code=code, add=True)

    def _mlp(self, block: Block) -> None:
        gate, up, down = projections(block)
        kind = self._kind(gate)
        if type(block.mlp.module) is SparseMLP:
            self._normalize(block.mlp_norm)
            self.due = block.mlp.module(self.x)[:, 0]
            return
        code = blocks.CODES[block.mlp.activation]
        if kind is None or kind != self._kind(up):
            self._normalize(block.mlp_norm)
            self._add(self._gate_times_up(gate(self.x)[:, 0], up(self.x)[:, 0], code), down)
            return
        gate_up = self.gate_up[:, : 2 * gate.out_features]
        self._normalize(block.mlp_norm, self.gate_up)
        self._rows(kind, self.x[:, 0], [gate, up], gate_up)
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

    def _rows(
        self, kind: tuple, x: Tensor, linears: list[nn.Module], y: Tensor,
        *, gate: Tensor | None = None, code: int = 0, add: bool = False,
    ) -> None:  # fmt: skip
        """y += the products, one after another, with x, or with act(gate) * x; y is zero where it is not `add`."""
        if kind[0] == "all":
            self._coded_rows(x, linears, y, gate, code, add=add)
        else:
            self._listed_rows(x, linears, y, gate, code, shared=kind[0] == "shared")

    def _listed_rows(
        self, x: Tensor, linears: list[nn.Module], y: Tensor, gate: Tensor | None, code: int, *, shared: bool
    ) -> None:
        K = linears[0].in_features
        config, (across, splits) = sparse_linear_batch.listed_rows_config(
            [linear.out_features for linear in linears], K, self.dtype.itemsize, self.multiprocessors
        )
        room = len(linears) * splits * config["CHANNELS"]
        list_n, count = (self.room(name, size, torch.int32) for name, size in (("list", room), ("count", room)))
        x_tn = self.room("x_tn", sparse_linear_batch.TOKENS * room, self.dtype)
        sparse_linear_batch.list_channels[(splits, len(linears))](
            x, x.stride(0), gate, *three(m.threshold for m in linears), list_n, x_tn, count, room, None, 0, self.B, K,
            CODE=code, SHARED=shared, ZEROS=1, **sparse_linear_batch.list_channels_config(config["CHANNELS"], self.B),
            **self.dependent,
        )  # fmt: skip
        sparse_linear_batch.listed_rows[(across, splits)](
            list_n, x_tn, count, room, *three(launch.codes(stored_of(m)).t() for m in linears),
            *three(m.bias for m in linears), *three(stored_of(m).scale for m in linears), y, y.stride(0), self.B,
            *sizes(linears), FORMAT=format_of(linears), **config, **self.dependent,
        )  # fmt: skip

    def _coded_rows(
        self, x: Tensor, linears: list[nn.Module], y: Tensor, gate: Tensor | None, code: int, *, add: bool
    ) -> None:
        K, format = linears[0].in_features, stored_of(linears[0]).format
        digits = self.digits.view(stored_linear.digits_dtype(format))
        config, grid = stored_linear.coded_rows_config(format, sizes(linears), K, self.device, K, self.B)
        stored_linear.write_digits[(self.B,)](
            x, x.stride(0), gate, None, 0.0, digits, self.back, None, 0, K, CODE=code, DTYPE=self.tl_dtype,
            ZEROS=1, **stored_linear.write_digits_config(format, K), **self.dependent,
        )  # fmt: skip
        stored_linear.coded_rows[grid](
            x, None, None, 0.0, *three(launch.codes(stored_of(m)) for m in linears), *three(m.bias for m in linears),
            *three(stored_of(m).scale for m in linears), y, y.stride(0), None, 0, None, digits, self.back,
            *sizes(linears), K, self.B, CODE=0, DTYPE=self.tl_dtype, ADD=add, SHARED=grid[1] > 1, ZEROS=1, **config,
            **self.dependent,
        )  # fmt: skip
