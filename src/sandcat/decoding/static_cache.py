"""The cache of a decoder whose step is not fused: of a fixed size, with one position for all layers, on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class DecodeCache(Cache):
    """Keys and values of up to so many tokens a sequence, for every layer of a model.

    `position` says how many are taken; whoever adds tokens moves it on: the last layer, or the step that stands for
    all of them. Layers are full-length for sliding windows too: their masks look at positions, so a graph can be
    replayed.
    """

    def __init__(self, layers: int, max_length: int, device: torch.device):
        self.position = torch.zeros((), dtype=torch.int32, device=device)
        self.pads: list[int] = []
        super().__init__(layers=[_Layer(max_length, self.position, i == layers - 1) for i in range(layers)])

    def begin(self, pads: list[int]) -> None:
        """Forgets all; padding is cached as tokens are, and masked."""
        self.pads = pads
        self.reset()

    def holds(self, length: int, end: int) -> bool:
        """Whether what is seen after `length` tokens is left, once `end` have been cached."""
        return True

    def rewind(self, length: int) -> None:
        """Goes back to `length` tokens, padding included."""
        self.position.fill_(length)

    def bytes_read(self) -> int:
        """Bytes that a step reads: all that is set aside."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


class _Layer(StaticLayer):
    """A layer of a cache whose position is the cache's."""

    def __init__(self, max_length: int, position: Tensor, is_last: bool):
        super().__init__(max_cache_len=max_length)
        self.cumulative_length, self.is_last = position, is_last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        position = self.cumulative_length
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = position  # not a copy of it, where the layer lies on another device

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        at = torch.arange(tokens, device=self.device) + self.cumulative_length.to(self.device)
        self.keys.index_copy_(2, at, key_states)
        self.values.index_copy_(2, at, value_states)
        if self.is_last:
            self.cumulative_length.add_(tokens)
        return self.keys, self.values
