"""A decode step in few kernels. On a GPU they are five a layer, instead of a compiler's dozen, for one sequence; on a
CPU one for all layers and up to 16 sequences (cpu_step.py).

Once skipping has made the large kernels short, the small ones and the time between them are what is left of a step. The
fused step applies to the families whose row in architectures.py says so; others run the step of transformers, compiled
or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sandcat.architectures import Block, ModelView
from sandcat.errors import UnsupportedModel
from sandcat.layers.int8 import Int8Linear, scale_of
from sandcat.layers.linear import SparseLinear
from sandcat.layers.mlp import SparseMLP
from sandcat.layers.sparse import Sparse
from sandcat.ops import kernel_name

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the sequence is."""


class Step(Protocol):
    """Called with ids [B, 1]: the logits [B, vocabulary] that follow; the tokens are added to the cache.

    The logits are overwritten by the next call. The B sequences are of one length and without padding, of which a
    step knows nothing: it sees all positions of the cache that are taken.
    """

    position: Tensor
    """int32 [1]: how many positions of the cache are taken."""

    def __call__(self, ids_B1: Tensor) -> Tensor: ...


def fused_step(model: nn.Module, cache: Cache) -> Step | None:
    """The fused step of a model over a static cache that holds a prompt; None where it does not apply.

    It applies to one sequence on CUDA with Triton, and up to `ops.MAX_TOKENS` on a CPU with OpenMP, to families with
    `Architecture.fused_step` whose weights have one dtype (or int8 and scales of that) and lie on one device, and whose
    modules are without hooks and adapters, which it would pass over. On CUDA down projections have no bias. Each module
    skips or runs dense as it does in the step of transformers.
    """
    kernels = kernel_name("sparse_mlp", model.device)
    if kernels not in ("triton", "numba"):
        return None
    try:
        view = ModelView(model)
        if not view.architecture.fused_step or view.decoder.rotary_emb.rope_type not in _ROPE_TYPES:
            return None
        blocks = list(view.blocks())
    except UnsupportedModel:
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    if any(isinstance(block.mlp.module, Sparse) and not isinstance(block.mlp.module, SparseMLP) for block in blocks):
        return None
    if len({(p.dtype, p.device) for p in model.parameters() if p.dtype != torch.int8}) != 1:
        return None
    batch = len(cache.layers[0].keys)
    if kernels == "numba":
        from sandcat import cpu_step  # here, as not every machine has Numba's kernels

        return cpu_step.CpuStep(view, blocks, cache) if cpu_step.applies(view, blocks, batch) else None
    if batch > 1:
        return None
    plain = type(model.get_output_embeddings()) in _LINEARS and all(_plain(block) for block in blocks)
    return FusedStep(view, blocks, cache) if plain else None


_LINEARS = (nn.Linear, Int8Linear, SparseLinear)


def _plain(block: Block) -> bool:
    attention = [block.q, block.k, block.v]
    *gate_up, down = mlp = _projections(block)
    if isinstance(block.mlp.module, SparseMLP) and SparseLinear in map(type, mlp[1:]):
        return False
    alike = all(len({linear.bias is None for linear in linears}) == 1 for linears in (attention, gate_up))
    return alike and down.bias is None and all(type(m) in _LINEARS for m in [*attention, block.o, *mlp])


class FusedStep:
    """The step on CUDA; see `Step`. Five kernels a layer; more where neighbours are not of one kind, and two more for
    `SparseMLP`s under `torch.use_deterministic_algorithms`, where all sums have a fixed order.
    """

    def __init__(self, view: ModelView, blocks: list[Block], cache: Cache):
        # here, as not every machine has Triton
        from sandcat.ops.triton import launch, sparse_linear, sparse_mlp, step

        self.linear_kernels, self.mlp_kernels, self.kernels = sparse_linear, sparse_mlp, step
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
        self.squares = buffer(sparse_linear.MOST_SQUARES.value, dtype=torch.float32)
        self.qkv, self.attended = buffer(self.Q + 2 * self.kv_heads * self.D), buffer(self.Q)
        self.hidden, self.gate_up, self.logits = buffer(neurons), buffer(2 * neurons), buffer(self.head.out_features)
        self.count, self.list_n = buffer(1, dtype=torch.int32), buffer(neurons, dtype=torch.int32)
        self.a_n, self.parts = buffer(neurons, dtype=torch.float32), sparse_mlp.parts_like(self.h)
        heads = self.Q // self.D
        self.splits = max(1, min(32, 2 ** (self.multiprocessors // self.kv_heads).bit_length() // 2))
        self.top, self.sum = (buffer(heads, self.splits, dtype=torch.float32) for _ in range(2))
        self.acc = buffer(heads, self.splits, self.D, dtype=torch.float32)
        self.heads_arrived, self.position = buffer(self.kv_heads, dtype=torch.int32), buffer(1, dtype=torch.int32)
        self.room: dict[str, Tensor] = {}
        positions = torch.arange(self.max_length, device=device)[None]
        cos, sin = decoder.rotary_emb(buffer(1, 1, self.H), position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    def __call__(self, ids_11: Tensor) -> Tensor:
        grid = (_tiles(self.H, 1024),)
        self.kernels.embed[grid](
            ids_11, self.table, self.h, self.squares, *self.table.stride(), self.H, BLOCK=1024, **self.dependent
        )  # fmt: skip
        self.n_squares = grid[0]
        for block, cached in self.layers:
            self._project(block.input_norm, [block.q, block.k, block.v], self.qkv)
            self._attend(block, cached.keys, cached.values)
            self._add(self.attended, block.o)
            self._mlp(block)
        self._project(self.norm, [self.head], self.logits, self.position)
        return self.logits[None]

    def _mlp(self, block: Block) -> None:
        norm, (gate, up, down), code = block.mlp_norm, _projections(block), self.mlp_kernels.CODES[block.mlp.activation]
        if isinstance(block.mlp.module, SparseMLP):
            self._skip_neurons(norm, block.mlp.module, gate, code)
        elif type(gate) is type(up) is not SparseLinear:
            config, grid = self._whole_rows(gate.weight, matrices=2)
            self.kernels.gate_up[grid](
                self.h, norm.weight, norm.variance_epsilon, gate.weight, up.weight, gate.bias, up.bias, scale_of(gate),
                scale_of(up), self.hidden, gate.out_features, self.H, CODE=code, **config, **self.dependent,
            )  # fmt: skip
            self._add(self.hidden, down)
        else:
            self._project(norm, [gate, up], self.gate_up)
            self._add(self.gate_up[gate.out_features :], down, gate=self.gate_up, code=code)

    def _skip_neurons(self, norm: nn.Module, mlp: SparseMLP, gate: nn.Module, code: int) -> None:
        """gate, and the list of the neurons to keep; then their up and down."""
        (up, up_bias, up_scale), down, kernels = mlp.up(), mlp.down.weight.t(), self.mlp_kernels
        count = self.count if self.parts is None else None
        if isinstance(gate, SparseLinear):
            self._sparse_rows(self.h, [gate], norm=norm, neurons=mlp.threshold, count=count, code=code)
        else:
            config = kernels.gate_config(self.H, gate.weight.element_size())
            kernels.gate_kernel[(_tiles(gate.out_features, config["ROWS"]),)](
                self.h, norm.weight, norm.variance_epsilon, gate.weight, gate.bias, scale_of(gate), mlp.threshold,
                count, self.list_n, self.a_n, self.x_normed, gate.out_features, self.H, CODE=code, **config,
                **self.dependent,
            )  # fmt: skip
        self.n_squares = kernels.up_down(
            self.x_normed, up, down, up_bias, up_scale, scale_of(mlp.down), self.count, self.list_n, self.a_n, self.h,
            self.squares, self.parts,
        )  # fmt: skip

    def _whole_rows(self, weight: Tensor, matrices: int = 1) -> tuple[dict, tuple[int]]:
        """Shape and number of the programs that read the rows of a matrix (or of two alike) in turn."""
        config = self.kernels.whole_rows_config(weight.shape[1], weight.element_size(), matrices)
        return config, (self.multiprocessors * config.pop("per_multiprocessor"),)

    def _project(self, norm: nn.Module, linears: list[nn.Module], out: Tensor, position: Tensor | None = None) -> None:
        """out = the products of the layers with the normed h, one after another; neighbours of one kind at once."""
        start = 0
        for (kind, _), alike in groupby(linears, lambda linear: (type(linear), linear.weight.dtype)):
            alike = list(alike)
            y = out[start:]
            start += sum(linear.out_features for linear in alike)
            if kind is SparseLinear:
                self._sparse_rows(self.h, alike, norm=norm, y=y, position=position)
                continue
            config, grid = self._whole_rows(alike[0].weight)
            self.kernels.project[grid](
                self.h, norm.weight, norm.variance_epsilon, *_three(m.weight for m in alike),
                *_three(m.bias for m in alike), *_three(map(scale_of, alike)), y, position, *_sizes(alike), self.H,
                **config, **self.dependent,
            )  # fmt: skip

    def _attend(self, block: Block, keys: Tensor, values: Tensor) -> None:
        D, K, G = self.D, self.kv_heads * self.D, self.Q // (self.kv_heads * self.D)
        q, k, v = self.qkv.split([self.Q, K, K])
        norms = [None if norm is None else norm.weight for norm in (block.q_norm, block.k_norm)]
        self.kernels.attend[(self.kv_heads, self.splits)](
            q, k, v, *norms, 0.0 if block.q_norm is None else block.q_norm.variance_epsilon, self.cos, self.sin,
            self.position, keys, values, block.scaling, self.top, self.sum, self.acc, self.heads_arrived, self.attended,
            self.max_length, G, D, block.window or self.max_length,
            **self.kernels.attend_config(G, D, keys.element_size(), self.max_length, self.splits), **self.dependent,
        )  # fmt: skip

    def _add(self, x: Tensor, linear: nn.Module, *, gate: Tensor | None = None, code: int = 0) -> None:
        """h += the layer's product with x, or with act(gate) * x."""
        if isinstance(linear, SparseLinear):
            self._sparse_rows(x, [linear], gate=gate, h=self.h, code=code)
            return
        config, grid = self._whole_rows(linear.weight)
        self.kernels.add_rows[grid](
            x, gate, linear.weight, linear.bias, scale_of(linear), self.h, self.squares, self.count,
            *linear.weight.shape, CODE=code, **config, **self.dependent,
        )  # fmt: skip
        self.n_squares = grid[0]

    def _sparse_rows(
        self,
        x: Tensor,
        linears: list[SparseLinear],
        *,
        gate: Tensor | None = None,
        norm: nn.Module | None = None,
        y: Tensor | None = None,
        h: Tensor | None = None,
        neurons: Tensor | None = None,
        count: Tensor | None = None,
        position: Tensor | None = None,
        code: int = 0,
    ) -> None:
        """The products with x, with act(gate) * x or with the normed x, to y, to h, or to the list of neurons."""
        channels, itemsize = linears[0].in_features, linears[0].weight.element_size()
        config, grid = self.linear_kernels.sparse_rows_config(
            [linear.out_features for linear in linears], channels, itemsize, self.multiprocessors
        )
        sizes, programs = _sizes(linears), grid[0] * grid[1]
        self.linear_kernels.sparse_rows[grid](
            x, gate, None if norm is None else norm.weight, 0.0 if norm is None else norm.variance_epsilon,
            None if self.n_squares is None and h is None else self.squares, self.n_squares or 0,
            *_three(m.weight.t() for m in linears), *_three(m.threshold for m in linears),
            *_three(m.bias for m in linears), *_three(map(scale_of, linears)),
            self._room("list_i", programs * config["CHANNELS"], torch.int32),
            self._room("list_x", programs * config["CHANNELS"], torch.float32),
            self._room("parts", grid[1] * sum(sizes), torch.float32), self._room("arrived", grid[0], torch.int32),
            y, h, count if h is None else self.count, neurons, self.list_n, self.a_n,
            None if neurons is None else self.x_normed, position, *sizes, channels, CODE=code, **config,
            **self.dependent,
        )  # fmt: skip
        if h is not None:
            self.n_squares = grid[0]

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
