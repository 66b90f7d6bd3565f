"""What the fused steps on CUDA have in common: embedding, attention, and how parts are handed to kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sandcat.decoding.layer_parts import model_parts
from sandcat.layers.cache import PagedCache
from sandcat.layers.sparse_module import prompts_of
from sandcat.layers.step_parts import Attention, Linear
from sandcat.models.view import ModelView
from sandcat.ops import FORMATS
from sandcat.ops.triton import step
from sandcat.ops.triton.primitives import launch
from sandcat.ops.triton.primitives.arguments import Zeros
from sandcat.ops.triton.primitives.pages import Turn

READ = tuple(name for name, row in FORMATS.items() if "cuda" in row.devices)
"""Formats of weights that CUDA kernels read."""


class GpuStepBase(ABC):
    """What a step of B sequences writes: `state` and `h`, float32 [B, H], what is attended to [B, Q], and the cache."""

    def __init__(self, view: ModelView, cache: PagedCache):
        decoder, parts = view.decoder, model_parts(view, cache)
        self.table = view.model.get_input_embeddings().weight
        self.layers, (self.norm, self.head) = parts.layers, parts.head
        self.prompts = prompts_of(view.model)
        self.device, self.dtype = self.table.device, self.table.dtype
        self.dependent, self.multiprocessors = launch.dependent_launch(self.device), launch.multiprocessors(self.device)
        (self.B, self.kv_heads, self.D), self.max_length = cache.layers[0].shape, cache.max_length
        self.H, self.Q = self.table.shape[1], parts.heads * self.D
        self.K, self.neurons, self.vocabulary = self.kv_heads * self.D, parts.neurons, parts.vocabulary
        self.tl_dtype, self.room = launch.tl_dtype(self.dtype), launch.Workspace(self.device)
        self.state, self.attended = self.floats(self.B, self.H), self.buffer(self.B, self.Q)
        self.h = self.state
        self.cache, self.position = cache, cache.length_B
        positions = torch.arange(self.max_length, device=self.device)[None]
        cos, sin = decoder.rotary_emb(self.buffer(1, 1, self.H), position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()

    def __call__(self, ids_B1: Tensor) -> Tensor:
        self.cache.begin_step()
        with nullcontext() if self.prompts is None else self.prompts.decoded():
            return self.run(ids_B1)

    @abstractmethod
    def run(self, ids_B1: Tensor) -> Tensor:
        """The kernels of a step, one after another; see `DecodeStep`."""

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*shape, dtype=dtype or self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return self.buffer(*shape, dtype=torch.float32)

    def turn_of(self, part: Attention) -> Turn:
        """How the rows of q and k are normed and turned."""
        turn = Turn(self.position, self.cos, self.sin)
        if part.q_norm is None or part.k_norm is None:
            return turn
        return turn._replace(q_norm=part.q_norm.weight, k_norm=part.k_norm.weight, eps=part.q_norm.eps)

    def embed(self, ids_B1: Tensor) -> None:
        """h = the rows of the tokens."""
        step.embed[(tiles(self.H, 1024), self.B)](
            ids_B1, ids_B1.stride(0), self.table, self.h, *self.table.stride(), self.H, BLOCK=1024, **self.dependent
        )  # fmt: skip


def tiles(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def format_of(parts: list[Linear]) -> int:
    """What kernels know the format by that the weights of one launch are stored in."""
    return launch.code_of(parts[0].stored.format)


def codes_of(parts: list[Linear]) -> list[Tensor]:
    """Their weights as kernels take them, [O, I]."""
    return [launch.codes(part.stored) for part in parts]


def kind_of(part: Any) -> tuple:
    """By what a launcher is looked up: the exact type of a part, and the format of its weight, if that lies as kernels
    read it."""
    stored, kept = getattr(part, "stored", None), getattr(part, "kept", None)
    if stored is None or not part.lies or not (kept is None or kept.packed):
        return (type(part),)
    return type(part), stored.format


def alike(part: Any) -> tuple:
    """What the products of one launch have in common: their kind, and whether they have biases."""
    kind = kind_of(part)
    return kind if len(kind) == 1 else (*kind, part.stored.bias is None)


def zeros_of(sums: Tensor | None, programs: int) -> tuple[Zeros, int]:
    """These sums to be filled with zeros, and how many each of so many programs writes, a power of two."""
    if sums is None:
        return Zeros(), 1
    return Zeros(sums, sums.numel()), 1 << (tiles(sums.numel(), programs) - 1).bit_length()
