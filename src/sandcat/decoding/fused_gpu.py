"""The fused step of one sequence on CUDA, five kernels a layer. The kernels are in ops/triton; see step.py."""

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
from sandcat.ops import FORMATS
from sandcat.ops.triton import sparse_linear, sparse_mlp, step, stored_linear
from sandcat.ops.triton.primitives import launch

_LINEARS = (nn.Linear, StoredLinear, SparseLinear)


def applies(view: ModelView, blocks: list[Block]) -> bool:
    """Whether `GpuStep` knows the kernels of all layers of this model."""
    return _is_known(view.model.get_output_embeddings()) and all(_plain(block) for block in blocks)


def _is_known(linear: nn.Module) -> bool:
    return type(linear) in _LINEARS and "cuda" in FORMATS[stored_of(linear).format].devices


def _plain(block: Block) -> bool:
    attention = [block.q, block.k, block.v]
    *gate_up, down = mlp = projections(block)
    if type(block.mlp.module) is SparseMLP and SparseLinear in map(type, mlp[1:]):
        return False
    alike = all(len({linear.bias is None for linear in linears}) == 1 for linears in (attention, gate_up))
    return alike and down.bias is None and all(_is_known(m) for m in [*attention, block.o, *mlp])


class GpuStep(Parts):
    """The step of one sequence on CUDA; see `Step`. Five kernels a layer; more where neighbours are not of one kind,
    and two more for `SparseMLP`s under `torch.use_deterministic_algorithms`, where all sums have a fixed order.
    """

    def __init__(self, view: ModelView, blocks: list[Block], cache: DecodeCache):
        super().__init__(view, blocks, cache)
        self.h, self.attended = self.h[0], self.attended[0]
        neurons, qkv = self.neurons, self.Q + 2 * self.K
        self.x_normed, self.hidden = self.buffer(self.H), self.buffer(neurons)
        self.logits = self.buffer(self.head.out_features)
        self.sums = self.floats(qkv + 2 * neurons + 1)
        self.qkv, self.gate_up, count = self.sums.split([qkv, 2 * neurons, 1])
        self.count, self.list_n = count.view(torch.int32), self.buffer(neurons, dtype=torch.int32)
        self.a_n, self.parts = self.floats(neurons), sparse_mlp.parts_like(self.h)
        self.ordered = torch.are_deterministic_algorithms_enabled()

    def __call__(self, ids_B1: Tensor) -> Tensor:
        self.embed(ids_B1)
        for block, cached in self.layers:
            self._project(block.input_norm, [block.q, block.k, block.v], self.qkv)
            q, k, v = (part[None] for part in self.qkv.split([self.Q, self.K, self.K]))
            out = None if type(block.o) is SparseLinear else self.attended  # a sparse o adds parts up itself
            self.attend(block, cached.keys, cached.values, q, k, v, out)
            self._add(self.attended, block.o, zeros=self.sums)
            self._mlp(block)
        self._project(self.norm, [self.head], self.logits, self.position)
        return self.logits[None]

    def _mlp(self, block: Block) -> None:
        norm, (gate, up, down), code = block.mlp_norm, projections(block), sparse_mlp.CODES[block.mlp.activation]
        if type(block.mlp.module) is SparseMLP:
            self._skip_neurons(norm, block.mlp.module, gate)
        elif type(gate) is type(up) is nn.Linear:
            config, grid = self._whole_rows(gate.weight, matrices=2)
            step.gate_up[grid](
                self.h, norm.weight, norm.variance_epsilon, gate.weight, up.weight, gate.bias, up.bias, self.hidden,
                gate.out_features, self.H, CODE=code, **config, **self.dependent,
            )  # fmt: skip
            self._add(self.hidden, down)
        else:
            self._project(norm, [gate, up], self.gate_up)
            self._add(self.gate_up[gate.out_features :], down, gate=self.gate_up, code=code)

    def _skip_neurons(self, norm: nn.Module, mlp: SparseMLP, gate: nn.Module) -> None:
        """gate, and the list of the neurons to keep; then their up and down."""
        code = sparse_mlp.CODES[mlp.activation]
        count = self.count if self.parts is None else None
        if type(gate) is SparseLinear:
            self._sparse_rows(self.h, [gate], None, norm=norm, neurons=mlp.threshold, count=count, code=code)
        else:
            config = sparse_mlp.gate_config(gate.weight.element_size())
            sparse_mlp.gate_kernel[(tiles(gate.out_features, config["ROWS"]),)](
                self.h, norm.weight, norm.variance_epsilon, launch.codes(stored_of(gate)), gate.bias,
                stored_of(gate).scale, mlp.threshold, count, self.list_n, self.a_n, self.x_normed, gate.out_features,
                self.H, FORMAT=format_of([gate]), CODE=code, **config, **self.dependent,
            )  # fmt: skip
        sparse_mlp.up_down(
            self.x_normed, mlp.up(), stored_of(mlp.down), self.count, self.list_n, self.a_n, self.h, self.parts
        )  # fmt: skip

    def _whole_rows(self, weight: Tensor, matrices: int = 1) -> tuple[dict, tuple[int]]:
        """Shape and number of the programs that read the rows of a matrix (or of two alike) in turn."""
        config = step.whole_rows_config(weight.shape[1], weight.element_size(), matrices)
        return config, (self.multiprocessors * config.pop("per_multiprocessor"),)

    def _project(self, norm: nn.Module, linears: list[nn.Module], out: Tensor, position: Tensor | None = None) -> None:
        """out = the products of the layers with the normed h, one after another; neighbours of one kind at once.

        Layers that skip, or whose weights are codes, add to `out`, unless it is the logits.
        """
        start = 0
        for (kind, format), group in groupby(linears, lambda linear: (type(linear), stored_of(linear).format)):
            alike = list(group)
            y = out[start:]
            start += sum(linear.out_features for linear in alike)
            if kind is SparseLinear:
                self._sparse_rows(self.h, alike, y, norm=norm, position=position)
            elif format != "float":
                self._coded_rows(self.h, alike, y, norm=norm, position=position)
            else:
                config, grid = self._whole_rows(alike[0].weight)
                step.project[grid](
                    self.h, norm.weight, norm.variance_epsilon, *three(m.weight for m in alike),
                    *three(m.bias for m in alike), y, position, *sizes(alike), self.H, **config, **self.dependent,
                )  # fmt: skip

    def _add(
        self, x: Tensor, linear: nn.Module, *, gate: Tensor | None = None, code: int = 0, zeros: Tensor | None = None
    ) -> None:
        """h += the layer's product with x, or with act(gate) * x; and zeros = 0."""
        if type(linear) is SparseLinear:
            self._sparse_rows(x, [linear], self.h, gate=gate, code=code, zeros=zeros)
        elif stored_of(linear).format != "float":
            self._coded_rows(x, [linear], self.h, gate=gate, code=code, zeros=zeros)
        else:
            config, grid = self._whole_rows(linear.weight)
            step.add_rows[grid](
                x, gate, linear.weight, linear.bias, self.h, zeros, len(self.sums),
                *linear.weight.shape, CODE=code, DTYPE=self.tl_dtype, ZEROS=share_of(zeros, grid[0]), **config,
                **self.dependent,
            )  # fmt: skip

    def _sparse_rows(
        self,
        x: Tensor,
        linears: list[SparseLinear],
        y: Tensor | None,
        *,
        gate: Tensor | None = None,
        norm: nn.Module | None = None,
        neurons: Tensor | None = None,
        count: Tensor | None = None,
        position: Tensor | None = None,
        code: int = 0,
        zeros: Tensor | None = None,
    ) -> None:
        """The products with x, with act(gate) * x or with the normed x, added to y, or to the list of neurons."""
        channels, itemsize = linears[0].in_features, linears[0].weight.element_size()
        config, grid = sparse_linear.sparse_rows_config(
            [linear.out_features for linear in linears], channels, itemsize, self.multiprocessors
        )
        columns, programs, heads = sizes(linears), grid[0] * grid[1], x is self.attended
        ordered = self.ordered or y is None or y.dtype != torch.float32 or position is not None
        parts = arrived = None
        if ordered:
            parts = self.room("parts", grid[1] * sum(columns), torch.float32)
            arrived = self.room("arrived", grid[0], torch.int32)
        sparse_linear.sparse_rows[grid](
            self.acc if heads else x, gate, *_norm(norm), self.top if heads else None, self.sum if heads else None,
            self.D, *three(launch.codes(stored_of(m)).t() for m in linears), *three(m.threshold for m in linears),
            *three(m.bias for m in linears), *three(stored_of(m).scale for m in linears),
            self.room("list_i", programs * config["CHANNELS"], torch.int32),
            self.room("list_x", programs * config["CHANNELS"], torch.float32),
            parts, arrived, y, zeros, len(self.sums), neurons, self.list_n, self.a_n, count,
            None if neurons is None else self.x_normed, position, *columns, channels,
            FORMAT=format_of(linears), CODE=code, ADD=position is None, ORDERED=ordered,
            HEAD_PARTS=self.splits if heads else 0, ZEROS=share_of(zeros, programs), **config, **self.dependent,
        )  # fmt: skip

    def _coded_rows(
        self,
        x: Tensor,
        linears: list[StoredLinear],
        y: Tensor,
        *,
        gate: Tensor | None = None,
        norm: nn.Module | None = None,
        position: Tensor | None = None,
        code: int = 0,
        zeros: Tensor | None = None,
    ) -> None:
        """y = the products with the normed x, added to zeroes where y is float32; or y += those with x, or with
        act(gate) * x."""
        rows, columns = sizes(linears), linears[0].in_features
        most = columns if position is None else 1  # programs that may add to one sum: the logits are not zeroed
        if self.ordered:
            most = min(most, 1 if norm is None else 2)  # two added to zero are the same in any order
        config, grid = stored_linear.coded_rows_config(stored_of(linears[0]).format, rows, columns, x.device, most)
        programs = grid[0] * grid[1]
        stored_linear.coded_rows[grid](
            x, gate, *_norm(norm), *three(launch.codes(stored_of(m)) for m in linears), *three(m.bias for m in linears),
            *three(stored_of(m).scale for m in linears), y, 0, zeros, len(self.sums), position,
            self.room("digits", programs * config["SLICE"], torch.int32), None, *rows, columns, 1, CODE=code,
            DTYPE=self.tl_dtype, ADD=norm is None, SHARED=grid[1] > 1, ZEROS=share_of(zeros, programs), **config,
            **self.dependent,
        )  # fmt: skip


def _norm(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
