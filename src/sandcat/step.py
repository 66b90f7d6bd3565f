"""A decode step of one sequence on a GPU in five kernels a layer, instead of a compiler's dozen.

Once skipping has made the large kernels short, the small ones and the time between them are what is left of a step. The
fused step applies to the families whose row in architectures.py says so; others run the step of transformers, compiled
or not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sandcat.architectures import Block, ModelView
from sandcat.errors import UnsupportedModel
from sandcat.layers.mlp import SparseMLP
from sandcat.ops import kernel_name

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the sequence is."""


def fused_step(model: nn.Module, cache: Cache) -> FusedStep | None:
    """The fused step of a model over a static cache that holds a prompt; None where it does not apply.

    It applies to one sequence, on CUDA with Triton, to families with `Architecture.fused_step` whose weights have one
    dtype and lie on one device, whose down projections have no bias, and whose modules are plain: without hooks and
    adapters, which it would pass over.
    """
    if kernel_name("sparse_mlp", model.device) != "triton" or cache.layers[0].keys.shape[0] != 1:
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    try:
        view = ModelView(model)
        if not view.architecture.fused_step or view.decoder.rotary_emb.rope_type not in _ROPE_TYPES:
            return None
        blocks = list(view.blocks())
    except UnsupportedModel:
        return None
    if len({(p.dtype, p.device) for p in model.parameters()}) != 1:
        return None
    if not all(_plain(block) for block in blocks) or type(model.get_output_embeddings()) is not nn.Linear:
        return None
    return FusedStep(view, blocks, cache)


def _plain(block: Block) -> bool:
    linears = [block.q, block.k, block.v, block.o]
    mlp = [getattr(block.mlp.module, name) for name in _mlp_names(block)]
    biases = {linear.bias is None for linear in linears[:3]}
    down = getattr(block.mlp.module, block.mlp.architecture.down)
    return all(type(linear) is nn.Linear for linear in linears + mlp) and len(biases) == 1 and down.bias is None


class FusedStep:
    """Called with ids [1, 1]: the logits [1, vocabulary] that follow; the token is added to the cache.

    The logits are overwritten by the next call. `position`, int32 [1], says how many positions of the cache are taken.
    """

    def __init__(self, view: ModelView, blocks: list[Block], cache: Cache):
        from sandcat.ops.triton import launch, sparse_mlp, step  # here, as not every machine has Triton

        self.mlp_kernels, self.kernels = sparse_mlp, step

        model, decoder = view.model, view.decoder
        self.table = model.get_input_embeddings().weight
        self.head, self.norm = model.get_output_embeddings(), decoder.norm
        self.layers = list(zip(blocks, cache.layers, strict=True))
        device, dtype = self.table.device, self.table.dtype
        self.dependent, self.multiprocessors = launch.dependent_launch(device), launch.multiprocessors(device)
        _, self.kv_heads, self.max_length, self.D = cache.layers[0].keys.shape
        self.H, self.Q = self.table.shape[1], blocks[0].q.out_features
        neurons = max(getattr(b.mlp.module, b.mlp.architecture.down).in_features for b in blocks)

        def buffer(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.h, self.x_normed = buffer(self.H, dtype=torch.float32), buffer(self.H)
        self.qkv, self.attended = buffer(self.Q + 2 * self.kv_heads * self.D), buffer(self.Q)
        self.hidden, self.logits = buffer(neurons), buffer(self.head.out_features)
        self.count, self.list_n = buffer(1, dtype=torch.int32), buffer(neurons, dtype=torch.int32)
        self.a_n = buffer(neurons, dtype=torch.float32)
        heads = self.Q // self.D
        self.splits = max(1, min(32, 2 ** (self.multiprocessors // self.kv_heads).bit_length() // 2))
        self.top, self.sum = (buffer(heads, self.splits, dtype=torch.float32) for _ in range(2))
        self.acc = buffer(heads, self.splits, self.D, dtype=torch.float32)
        self.arrived, self.position = buffer(self.kv_heads, dtype=torch.int32), buffer(1, dtype=torch.int32)
        positions = torch.arange(self.max_length, device=device)[None]
        cos, sin = decoder.rotary_emb(buffer(1, 1, self.H), position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    def __call__(self, ids_11: Tensor) -> Tensor:
        H, dependent, sparse_mlp, step = self.H, self.dependent, self.mlp_kernels, self.kernels
        step.embed[(_tiles(H, 1024),)](ids_11, self.table, self.h, H, BLOCK=1024, **dependent)
        for block, cached in self.layers:
            self._project(block.input_norm, [block.q, block.k, block.v], self.qkv)
            self._attend(block, cached.keys, cached.values)
            self._add(self.attended, block.o.weight, block.o.bias)
            norm, mlp = block.mlp_norm, block.mlp.module
            if isinstance(mlp, SparseMLP):
                (gate, gate_bias, _), (up, up_bias, _), down = mlp.gate(), mlp.up(), mlp.down.weight.t()
                config = sparse_mlp.gate_config(H, gate.element_size())
                sparse_mlp.gate_kernel[(_tiles(len(gate), config["ROWS"]),)](
                    self.h, norm.weight, norm.variance_epsilon, gate, gate_bias, mlp.threshold, self.count, self.list_n,
                    self.a_n, self.x_normed, len(gate), H, CODE=sparse_mlp.CODES[mlp.activation], **config, **dependent,
                )  # fmt: skip
                config = sparse_mlp.up_down_config(H, gate.element_size())
                sparse_mlp.up_down_kernel[(self.multiprocessors * config.pop("per_multiprocessor"),)](
                    self.x_normed, up, down, up_bias, self.count, self.list_n, self.a_n, self.h, len(up), H, **config,
                    **dependent,
                )  # fmt: skip
            else:
                gate, up, down = (getattr(mlp, name) for name in _mlp_names(block))
                config, grid = self._whole_rows(gate.weight, matrices=2)
                step.gate_up[grid](
                    self.h, norm.weight, norm.variance_epsilon, gate.weight, up.weight, gate.bias, up.bias, self.hidden,
                    gate.out_features, H, CODE=sparse_mlp.CODES[block.mlp.activation], **config, **dependent,
                )  # fmt: skip
                self._add(self.hidden, down.weight, None)
        self._project(self.norm, [self.head], self.logits, self.position)
        return self.logits[None]

    def _whole_rows(self, weight: Tensor, matrices: int = 1) -> tuple[dict, tuple[int]]:
        """Shape and number of the programs that read the rows of a matrix (or of two alike) in turn."""
        config = self.kernels.whole_rows_config(weight.shape[1], weight.element_size(), matrices)
        return config, (self.multiprocessors * config.pop("per_multiprocessor"),)

    def _project(self, norm: nn.Module, linears: list[nn.Linear], out: Tensor, position: Tensor | None = None) -> None:
        weights, biases = [m.weight for m in linears], [m.bias for m in linears]
        sizes = [len(w) for w in weights] + [0] * (3 - len(weights))
        rest = 3 - len(weights)
        config, grid = self._whole_rows(weights[0])
        self.kernels.project[grid](
            self.h, norm.weight, norm.variance_epsilon, *weights, *weights[:1] * rest, *biases, *biases[:1] * rest, out,
            position, *sizes, self.H, **config, **self.dependent,
        )  # fmt: skip

    def _attend(self, block: Block, keys: Tensor, values: Tensor) -> None:
        D, K, G = self.D, self.kv_heads * self.D, self.Q // (self.kv_heads * self.D)
        q, k, v = self.qkv.split([self.Q, K, K])
        norms = [None if norm is None else norm.weight for norm in (block.q_norm, block.k_norm)]
        self.kernels.attend[(self.kv_heads, self.splits)](
            q, k, v, *norms, 0.0 if block.q_norm is None else block.q_norm.variance_epsilon, self.cos, self.sin,
            self.position, keys, values, block.scaling, self.top, self.sum, self.acc, self.arrived, self.attended,
            self.max_length, G, D, block.window or self.max_length,
            **self.kernels.attend_config(G, D, keys.element_size(), self.max_length, self.splits), **self.dependent,
        )  # fmt: skip

    def _add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        config, grid = self._whole_rows(weight)
        self.kernels.add_rows[grid](x, weight, bias, self.h, self.count, *weight.shape, **config, **self.dependent)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _mlp_names(block: Block) -> tuple[str, str, str]:
    row = block.mlp.architecture
    return row.gate, row.up, row.down
