"""The fused step on CUDA, five kernels a layer. The kernels themselves are in ops/triton; see step.py."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sandcat.architectures import Block, ModelView
from sandcat.layers.int8 import Int8Linear, scale_of
from sandcat.layers.linear import SparseLinear
from sandcat.layers.mlp import SparseMLP
from sandcat.ops.triton import int8_linear, launch, sparse_linear, sparse_mlp, step

_LINEARS = (nn.Linear, Int8Linear, SparseLinear)


def applies(view: ModelView, blocks: list[Block], batch: int) -> bool:
    """Whether `GpuStep` runs this model: one sequence, and layers whose kernels it knows."""
    plain = type(view.model.get_output_embeddings()) in _LINEARS and all(_plain(block) for block in blocks)
    return batch == 1 and plain


def _plain(block: Block) -> bool:
    attention = [block.q, block.k, block.v]
    *gate_up, down = mlp = _projections(block)
    if isinstance(block.mlp.module, SparseMLP) and SparseLinear in map(type, mlp[1:]):
        return False
    alike = all(len({linear.bias is None for linear in linears}) == 1 for linears in (attention, gate_up))
    return alike and down.bias is None and all(type(m) in _LINEARS for m in [*attention, block.o, *mlp])


class GpuStep:
    """The step on CUDA; see `Step`. Five kernels a layer; more where neighbours are not of one kind, and two more for
    `SparseMLP`s under `torch.use_deterministic_algorithms`, where all sums have a fixed order.
    """

    def __init__(self, view: ModelView, blocks: list[Block], cache: Cache):
        model, decoder = view.model, view.decoder
        self.table = model.get_input_embeddings().weight
        self.head, self.norm = model.get_output_embeddings(), decoder.norm
        self.layers = list(zip(blocks, cache.layers, strict=True))
        device, dtype = self.table.device, self.table.dtype
        self.dependent, self.multiprocessors = launch.dependent_launch(device), launch.multiprocessors(device)
        _, self.kv_heads, self.max_length, self.D = cache.layers[0].keys.shape
        self.H, self.Q = self.table.shape[1], blocks[0].q.out_features
        neurons = max(_projections(b)[2].in_features for b in blocks)

        def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.h, self.x_normed = buffer(self.H, dtype=torch.float32), buffer(self.H)
        self.attended, self.hidden, self.logits = buffer(self.Q), buffer(neurons), buffer(self.head.out_features)
        qkv = self.Q + 2 * self.kv_heads * self.D
        self.sums = buffer(qkv + 2 * neurons + 1, dtype=torch.float32)
        self.qkv, self.gate_up, count = self.sums.split([qkv, 2 * neurons, 1])
        self.count, self.list_n = count.view(torch.int32), buffer(neurons, dtype=torch.int32)
        self.a_n, self.parts = buffer(neurons, dtype=torch.float32), sparse_mlp.parts_like(self.h)
        self.ordered, self.tl_dtype = torch.are_deterministic_algorithms_enabled(), launch.tl_dtype(dtype)
        heads = self.Q // self.D
        self.splits = max(1, min(32, 2 ** (self.multiprocessors // self.kv_heads).bit_length() // 2))
        self.top, self.sum = (buffer(heads, self.splits, dtype=torch.float32) for _ in range(2))
        self.acc = buffer(heads, self.splits, self.D, dtype=torch.float32)
        self.heads_arrived, self.position = buffer(self.kv_heads, dtype=torch.int32), buffer(1, dtype=torch.int32)
        self.room: dict[str, Tensor] = {}
        positions = torch.arange(self.max_length, device=device)[None]
        cos, sin = decoder.rotary_emb(buffer(1, 1, self.H), position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    def __call__(self, ids_B1: Tensor) -> Tensor:
        grid = (_tiles(self.H, 1024),)
        step.embed[grid](
            ids_B1, self.table, self.h, *self.table.stride(), self.H, BLOCK=1024, **self.dependent
        )  # fmt: skip
        for block, cached in self.layers:
            self._project(block.input_norm, [block.q, block.k, block.v], self.qkv)
            self._attend(block, cached.keys, cached.values)
            self._add(self.attended, block.o, zeros=self.sums)
            self._mlp(block)
        self._project(self.norm, [self.head], self.logits, self.position)
        return self.logits[None]

    def _mlp(self, block: Block) -> None:
        norm, (gate, up, down), code = block.mlp_norm, _projections(block), sparse_mlp.CODES[block.mlp.activation]
        if isinstance(block.mlp.module, SparseMLP):
            self._skip_neurons(norm, block.mlp.module, gate, code)
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

    def _skip_neurons(self, norm: nn.Module, mlp: SparseMLP, gate: nn.Module, code: int) -> None:
        """gate, and the list of the neurons to keep; then their up and down."""
        (up, up_bias, up_scale), down = mlp.up(), mlp.down.weight.t()
        count = self.count if self.parts is None else None
        if isinstance(gate, SparseLinear):
            self._sparse_rows(self.h, [gate], None, norm=norm, neurons=mlp.threshold, count=count, code=code)
        else:
            config = sparse_mlp.gate_config(self.H, gate.weight.element_size())
            sparse_mlp.gate_kernel[(_tiles(gate.out_features, config["ROWS"]),)](
                self.h, norm.weight, norm.variance_epsilon, gate.weight, gate.bias, scale_of(gate), mlp.threshold,
                count, self.list_n, self.a_n, self.x_normed, gate.out_features, self.H, CODE=code, **config,
                **self.dependent,
            )  # fmt: skip
        sparse_mlp.up_down(
            self.x_normed, up, down, up_bias, up_scale, scale_of(mlp.down), self.count, self.list_n, self.a_n, self.h,
            self.parts,
        )  # fmt: skip

    def _whole_rows(self, weight: Tensor, matrices: int = 1) -> tuple[dict, tuple[int]]:
        """Shape and number of the programs that read the rows of a matrix (or of two alike) in turn."""
        config = step.whole_rows_config(weight.shape[1], weight.element_size(), matrices)
        return config, (self.multiprocessors * config.pop("per_multiprocessor"),)

    def _project(self, norm: nn.Module, linears: list[nn.Module], out: Tensor, position: Tensor | None = None) -> None:
        """out = the products of the layers with the normed h, one after another; neighbours of one kind at once.

        Sparse and int8 layers add to `out`, unless it is the logits.
        """
        start = 0
        for (kind, dtype), group in groupby(linears, lambda linear: (type(linear), linear.weight.dtype)):
            alike = list(group)
            y = out[start:]
            start += sum(linear.out_features for linear in alike)
            if kind is SparseLinear:
                self._sparse_rows(self.h, alike, y, norm=norm, position=position)
            elif dtype == torch.int8:
                self._int8_rows(self.h, alike, y, norm=norm, position=position)
            else:
                config, grid = self._whole_rows(alike[0].weight)
                step.project[grid](
                    self.h, norm.weight, norm.variance_epsilon, *_three(m.weight for m in alike),
                    *_three(m.bias for m in alike), y, position, *_sizes(alike), self.H, **config, **self.dependent,
                )  # fmt: skip

    def _attend(self, block: Block, keys: Tensor, values: Tensor) -> None:
        """attended = ...; or parts of it, which a sparse o adds up itself."""
        D, K, G = self.D, self.kv_heads * self.D, self.Q // (self.kv_heads * self.D)
        q, k, v = self.qkv.split([self.Q, K, K])
        norms = [None if norm is None else norm.weight for norm in (block.q_norm, block.k_norm)]
        step.attend[(self.kv_heads, self.splits)](
            q, k, v, *norms, 0.0 if block.q_norm is None else block.q_norm.variance_epsilon, self.cos, self.sin,
            self.position, keys, values, block.scaling, self.top, self.sum, self.acc, self.heads_arrived,
            None if isinstance(block.o, SparseLinear) else self.attended,
            self.max_length, G, D, block.window,
            **step.attend_config(G, D, keys.element_size(), self.max_length, self.splits), **self.dependent,
        )  # fmt: skip

    def _add(
        self, x: Tensor, linear: nn.Module, *, gate: Tensor | None = None, code: int = 0, zeros: Tensor | None = None
    ) -> None:
        """h += the layer's product with x, or with act(gate) * x; and zeros = 0."""
        if isinstance(linear, SparseLinear):
            self._sparse_rows(x, [linear], self.h, gate=gate, code=code, zeros=zeros)
        elif linear.weight.dtype == torch.int8:
            self._int8_rows(x, [linear], self.h, gate=gate, code=code, zeros=zeros)
        else:
            config, grid = self._whole_rows(linear.weight)
            step.add_rows[grid](
                x, gate, linear.weight, linear.bias, self.h, zeros, len(self.sums),
                *linear.weight.shape, CODE=code, DTYPE=self.tl_dtype, ZEROS=_zeros(zeros, grid[0]), **config,
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
        sizes, programs, heads = _sizes(linears), grid[0] * grid[1], x is self.attended
        ordered = self.ordered or y is None or y.dtype != torch.float32 or position is not None
        parts = arrived = None
        if ordered:
            parts = self._room("parts", grid[1] * sum(sizes), torch.float32)
            arrived = self._room("arrived", grid[0], torch.int32)
        sparse_linear.sparse_rows[grid](
            self.acc if heads else x, gate, *_norm(norm), self.top if heads else None, self.sum if heads else None,
            self.D, *_three(m.weight.t() for m in linears), *_three(m.threshold for m in linears),
            *_three(m.bias for m in linears), *_three(map(scale_of, linears)),
            self._room("list_i", programs * config["CHANNELS"], torch.int32),
            self._room("list_x", programs * config["CHANNELS"], torch.float32),
            parts, arrived, y, zeros, len(self.sums), neurons, self.list_n, self.a_n, count,
            None if neurons is None else self.x_normed, position, *sizes, channels, CODE=code, ADD=position is None,
            ORDERED=ordered, HEAD_PARTS=self.splits if heads else 0, ZEROS=_zeros(zeros, programs), **config,
            **self.dependent,
        )  # fmt: skip

    def _int8_rows(
        self,
        x: Tensor,
        linears: list[Int8Linear],
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
        sizes, columns = _sizes(linears), linears[0].in_features
        most = columns if position is None else 1  # programs that may add to one sum: the logits are not zeroed
        if self.ordered:
            most = min(most, 1 if norm is None else 2)  # two added to zero are the same in any order
        config, grid = int8_linear.int8_rows_config(sizes, columns, x.device, most)
        programs = grid[0] * grid[1]
        int8_linear.int8_rows[grid](
            x, gate, *_norm(norm), *_three(m.weight for m in linears), *_three(m.bias for m in linears),
            *_three(map(scale_of, linears)), y, zeros, len(self.sums), position,
            self._room("digits", programs * config["SLICE"], torch.int32), *sizes, columns, CODE=code,
            DTYPE=self.tl_dtype, ADD=norm is None, SHARED=grid[1] > 1, ZEROS=_zeros(zeros, programs), **config,
            **self.dependent,
        )  # fmt: skip

    def _room(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """A buffer that programs of one launch share, zero at first; it grows to the largest launch."""
        if name not in self.room or len(self.room[name]) < size:
            self.room[name] = torch.zeros(size, dtype=dtype, device=self.h.device)
        return self.room[name]


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _projections(block: Block) -> tuple[nn.Module, nn.Module, nn.Module]:
    """gate, up and down of the MLP, which may be a sparse one."""
    row = block.mlp.architecture
    gate, up, down = (getattr(block.mlp.module, name) for name in (row.gate, row.up, row.down))
    return gate, up, down


def _three(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Tensors of up to three layers, filled up to three."""
    tensors = list(tensors)
    return tensors + tensors[:1] * (3 - len(tensors))


def _sizes(linears: list[nn.Module]) -> list[int]:
    """Output sizes of up to three layers, filled up to three."""
    return [linear.out_features for linear in linears] + [0] * (3 - len(linears))


def _norm(norm: nn.Module | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)


def _zeros(zeros: Tensor | None, programs: int) -> int:
    """How many zeroes each of so many programs writes, as a power of two."""
    return 1 if zeros is None else 1 << (_tiles(len(zeros), programs) - 1).bit_length()
