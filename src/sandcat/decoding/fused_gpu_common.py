"""What the fused steps on CUDA have in common: embedding, attention, and how layers are handed to kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sandcat.decoding.static_cache import DecodeCache
from sandcat.layers.weights import stored_of
from sandcat.models.view import Block, ModelView
from sandcat.ops.triton import step
from sandcat.ops.triton.primitives import launch


class Parts:
    """What a step of B sequences writes: `state` and `h`, float32 [B, H], what is attended to [B, Q], and the cache."""

    def __init__(self, view: ModelView, blocks: list[Block], cache: DecodeCache):
        decoder = view.decoder
        self.table = view.model.get_input_embeddings().weight
        self.head, self.norm = view.model.get_output_embeddings(), decoder.norm
        self.layers = list(zip(blocks, cache.layers, strict=True))
        self.device, self.dtype = self.table.device, self.table.dtype
        self.dependent, self.multiprocessors = launch.dependent_launch(self.device), launch.multiprocessors(self.device)
        self.B, self.kv_heads, self.max_length, self.D = cache.layers[0].keys.shape
        self.H, self.Q = self.table.shape[1], blocks[0].q.out_features
        self.K, self.neurons = self.kv_heads * self.D, max(projections(b)[2].in_features for b in blocks)
        self.tl_dtype, self.room = launch.tl_dtype(self.dtype), launch.Workspace(self.device)
        self.state, self.attended = self.floats(self.B, self.H), self.buffer(self.B, self.Q)
        self.h = self.state
        every = self.B * self.kv_heads
        self.splits = step.attend_splits(every, self.max_length, self.multiprocessors)
        self.top, self.sum = (self.floats(self.B * self.Q // self.D, self.splits) for _ in range(2))
        self.acc = self.floats(self.B * self.Q // self.D, self.splits, self.D)
        self.heads_arrived, self.position = self.buffer(every, dtype=torch.int32), cache.position
        positions = torch.arange(self.max_length, device=self.device)[None]
        cos, sin = decoder.rotary_emb(self.buffer(1, 1, self.H), position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*shape, dtype=dtype or self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return self.buffer(*shape, dtype=torch.float32)

    def embed(self, ids_B1: Tensor) -> None:
        """h = the rows of the tokens."""
        step.embed[(tiles(self.H, 1024), self.B)](
            ids_B1, ids_B1.stride(0), self.table, self.h, *self.table.stride(), self.H, BLOCK=1024, **self.dependent
        )  # fmt: skip

    def attend(self, block: Block, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None):
        """out = what the rows of q, k and v [B, ...] attend to; without it parts of that, in `top`, `sum` and `acc`."""
        G = self.Q // self.K
        norms = [None if norm is None else norm.weight for norm in (block.q_norm, block.k_norm)]
        programs = self.B * self.kv_heads * self.splits
        config = step.attend_config(
            G, self.D, keys.element_size(), self.max_length, self.splits, programs > self.multiprocessors
        )
        step.attend[(self.B * self.kv_heads, self.splits)](
            q, k, v, q.stride(0), k.stride(0), v.stride(0), *norms,
            0.0 if block.q_norm is None else block.q_norm.variance_epsilon, self.cos, self.sin, self.position, keys,
            values, block.scaling, self.top, self.sum, self.acc, self.heads_arrived, out, self.max_length,
            self.kv_heads, G, self.D, block.window,
            **config, **self.dependent,
        )  # fmt: skip


def tiles(size: int, block: int) -> int:
    return -(-size // block)


def projections(block: Block) -> tuple[nn.Module, nn.Module, nn.Module]:
    """gate, up and down of the MLP, which may be a sparse one."""
    row = block.mlp.architecture
    gate, up, down = (getattr(block.mlp.module, name) for name in (row.gate, row.up, row.down))
    return gate, up, down


def three(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Tensors of up to three layers, filled up to three."""
    tensors = list(tensors)
    return tensors + tensors[:1] * (3 - len(tensors))


def sizes(linears: list[nn.Module]) -> list[int]:
    """Output sizes of up to three layers, filled up to three."""
    return [linear.out_features for linear in linears] + [0] * (3 - len(linears))


def format_of(linears: list[nn.Module]) -> int:
    """What kernels know the format by that layers of one launch are stored in."""
    return launch.code_of(stored_of(linears[0]).format)


def share_of(zeros: Tensor | None, programs: int) -> int:
    """How many zeroes each of so many programs writes, as a power of two."""
    return 1 if zeros is None else 1 << (tiles(zeros.numel(), programs) - 1).bit_length()
