"""What a decoder has cached, in pages: one pool for all layers of a model, in which tables name each layer's pages.

Shapes: B sequences, N key-value heads, D size of a head, S tokens a page, M entries in a table, T new tokens. A
sequence that is padded on the left takes no place for that: its first token has index 0. So sequences of any lengths
lie in one cache, each in the pages that it needs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sandcat.ops.paged_attention import Pages


class Pool:
    """Pages of keys and of values, each of one key-value head. They move where there are not enough of them."""

    def __init__(self, page: int):
        self.page = page
        self.keys, self.values = torch.empty(0), torch.empty(0)
        """[pages, S, D]."""

    def hold(self, pages: int, like: Tensor) -> None:
        """Has at least so many pages, for heads like those of [B, N, T, D]; what they held is lost."""
        if len(self.keys) < pages:
            self.keys = self.values = torch.empty(0)  # not beside the new ones
            shape = (pages, self.page, like.shape[-1])
            self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def bytes_of(self, tokens: int) -> int:
        """Bytes that the keys and values of one head of so many tokens have."""
        return 2 * tokens * self.keys.shape[-1] * self.keys.itemsize


class Keeps(NamedTuple):
    """What the heads of a layer keep: how many tokens they see, the own included; None for all.

    Args:
        window: of all heads.
        heads: of each key-value head besides, if these differ.
    """

    window: int | None = None
    heads: tuple[int | None, ...] | None = None

    def of(self, head: int) -> int | None:
        windows = [w for w in (self.window, self.heads[head] if self.heads else None) if w is not None]
        return min(windows) if windows else None


class CacheLayer(CacheLayerMixin):
    """One layer of a `PagedCache`.

    Args:
        keeps: pages that no token to come sees are used again, so that a head takes as many as its window needs.
    """

    is_sliding = False  # for transformers, which gets all keys that are left, and masks the others
    max_cache_len = -1

    def __init__(self, cache: PagedCache, keeps: Keeps, is_last: bool):
        super().__init__()
        self.cache, self.keeps, self.is_last = cache, keeps, is_last
        self.table_BNM = torch.empty(0, dtype=torch.int32)
        """int32: the pages of a head, in order."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, N and D, once something is cached."""
        return len(self.table_BNM), self.table_BNM.shape[1], self.cache.pool.keys.shape[-1]

    @property
    def window(self) -> int | None:
        """Of all heads, which kernels are told; those of single heads they see by where a head's keys start."""
        return self.keeps.window

    def most_pages(self, head: int) -> int:
        """Pages of a head, at most: those of its window, wherever it begins in a page, and one to go back."""
        cache, window = self.cache, self.keeps.of(head)
        return cache.entries if window is None else min(cache.entries, -(-window // cache.page) + 1)

    @property
    def groups(self) -> list[tuple[list[int], int]]:
        """Heads that have as many pages, and how many these are at most."""
        found: dict[int, list[int]] = {}
        for head in range(self.table_BNM.shape[1]):
            found.setdefault(self.most_pages(head), []).append(head)
        return [(heads, pages) for pages, heads in found.items()]

    def lay_out(self, first: int, heads: int) -> int:
        """Takes pages of the pool from the first one on; the next that is free."""
        entry_M, tables = torch.arange(self.cache.entries), []
        for pad in self.cache.pads:
            for head in range(heads):
                count = min(self.most_pages(head), self.cache.pages_of(self.cache.max_length - pad))
                tables.append(first + entry_M % max(count, 1))
                first += count
        table_BNM = torch.stack(tables).unflatten(0, (-1, heads)).int()
        if self.table_BNM.shape == table_BNM.shape:
            self.table_BNM.copy_(table_BNM)  # where a captured graph looks for it
        else:
            self.table_BNM = table_BNM.to(self.cache.length_B.device)
        return first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """transformers asks for it; `update` does it for all layers at once."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Adds new tokens, [B, N, T, D] twice; all keys and values as transformers takes them, padded on the left."""
        cache, T = self.cache, key_states.shape[2]
        if not cache.is_laid_out:
            cache.lay_out(key_states)
        self.is_initialized, is_prompt = True, cache.is_empty
        lengths = [T - pad for pad in cache.pads] if is_prompt else [n + T for n in cache.length_B.tolist()]
        for b, length in enumerate(lengths):
            for heads, pages in self.groups:
                page, slot = self.places(b, heads, pages, max(0, length - T), length)
                for pool, states in ((cache.pool.keys, key_states), (cache.pool.values, value_states)):
                    pool[page, slot] = states[b, heads, T - len(slot) :]
        if self.is_last:
            cache.length_B.copy_(torch.tensor(lengths))
            cache.is_empty = False
        return (key_states, value_states) if is_prompt else self.gathered(lengths)

    def places(self, b: int, heads: list[int], pages: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The pages [heads, T] and slots [T] of the tokens of a sequence from `first` to `end`, of those that are left
        in so many pages."""
        index_T = torch.arange(max(first, end - pages * self.cache.page), end, device=self.table_BNM.device)
        return self.table_BNM[b, heads][:, index_T // self.cache.page].long(), index_T % self.cache.page

    def gathered(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of sequences of these lengths, [B, N, longest, D] each, 0 where there are none (any more)."""
        cache, found = self.cache, []
        longest = max(length + pad for length, pad in zip(lengths, cache.pads, strict=True))
        for pool in (cache.pool.keys, cache.pool.values):
            all_BNTD = pool.new_zeros(*self.table_BNM.shape[:2], longest, pool.shape[-1])
            for b, length in enumerate(lengths):
                end = cache.pads[b] + length
                for heads, pages in self.groups:
                    page, slot = self.places(b, heads, pages, 0, length)
                    all_BNTD[b, heads, end - len(slot) : end] = pool[page, slot]
            found.append(all_BNTD)
        return found[0], found[1]

    def pages(self) -> Pages:
        """As ops take them; they see what was cached before a step."""
        cache, (B, N, _) = self.cache, self.table_BNM.shape
        keys, values = (pool[:, :, None].expand(-1, -1, N, -1) for pool in (cache.pool.keys, cache.pool.values))
        start = cache.start_B1.expand(B, N) if self.start_BN is None else self.start_BN
        return Pages([keys], [values], self.table_BNM, start, cache.length_B[:, None].expand(B, N))

    @property
    def start_BN(self) -> Tensor | None:
        """Where the keys start that heads see, in a step that `begin_step` has begun; None where all start alike."""
        return self.cache.start_LBN[self.cache.by_head.index(self)] if self.keeps.heads else None

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, S, D], where a head has one page."""
        B, N, M = self.table_BNM.shape
        assert M == 1
        own = slice(int(self.table_BNM[0, 0, 0]), int(self.table_BNM[-1, -1, 0]) + 1)
        return self.cache.pool.keys[own].unflatten(0, (B, N)), self.cache.pool.values[own].unflatten(0, (B, N))

    def bytes_read(self) -> int:
        """Bytes of keys and values that a step reads after the tokens that are cached."""
        windows = [self.keeps.of(head) for head in range(self.table_BNM.shape[1])]
        lengths = self.cache.length_B.tolist()
        return self.cache.pool.bytes_of(sum(min(length, w or length) for length in lengths for w in windows))

    def holds(self, length: int, end: int) -> bool:
        """Whether the tokens that it sees after `length` are left, once `end` have been cached."""
        heads = self.keeps.heads or (None,)
        left = [self.most_pages(head) * self.cache.page - (self.keeps.of(head) or 0) for head in range(len(heads))]
        whole = [self.most_pages(head) == self.cache.entries for head in range(len(heads))]
        return all(all_there or end - length <= most for all_there, most in zip(whole, left, strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.get_seq_length()) + query_length, 0

    def get_seq_length(self) -> Tensor | int:
        return 0 if self.cache.is_empty else (self.cache.length_B + self.cache.pad_B).max()

    def get_max_length(self) -> int:
        return self.cache.max_length


class PagedCache(Cache):
    """Keys and values of up to so many tokens a sequence, for a step that reads pages.

    `length_B` (int32, on the device) says how many tokens each sequence has, and so the position of its next one.
    Whoever adds tokens moves it on: the last layer, or the step that stands for all of them.

    Args:
        keeps: of each layer.
        max_length: tokens of a sequence, its padding included, at most.
        page: tokens a page.
    """

    def __init__(self, keeps: list[Keeps], max_length: int, batch: int, page: int, device: torch.device):
        self.max_length, self.page, self.pool = max_length, page, Pool(page)
        self.length_B, self.pad_B = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
        self.start_B1 = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        self.pads = [0] * batch
        """Tokens of padding that came before each sequence."""
        self.is_empty, self.is_laid_out = True, False
        last = len(keeps) - 1
        super().__init__(layers=[CacheLayer(self, own, i == last) for i, own in enumerate(keeps)])
        self.by_head = [layer for layer in self.layers if layer.keeps.heads]
        """Layers whose heads keep different windows."""
        windows = [[layer.keeps.of(n) or 2**30 for n in range(len(layer.keeps.heads))] for layer in self.by_head]
        self.window_L1N = torch.tensor(windows, dtype=torch.int32, device=device)
        self.window_L1N = self.window_L1N.reshape(len(windows), 1, len(windows[0]) if windows else 0)
        self.start_LBN = self.window_L1N.expand(-1, batch, -1).clone()

    @property
    def position(self) -> Tensor:
        """What steps move on."""
        return self.length_B

    @property
    def entries(self) -> int:
        """Of a table."""
        return self.pages_of(self.max_length)

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def begin(self, pads: list[int]) -> None:
        """Forgets all; what comes next are prompts with so much padding on the left."""
        self.is_laid_out = self.is_laid_out and pads == self.pads
        self.pads, self.is_empty = pads, True
        self.pad_B.copy_(torch.tensor(pads))
        self.length_B.zero_()

    def lay_out(self, like: Tensor) -> None:
        """Gives each layer its pages, for keys like those of [B, N, T, D]."""
        first = 0
        for layer in self.layers:
            first = layer.lay_out(first, like.shape[1])
        self.pool.hold(first, like)
        self.is_laid_out = True

    def begin_step(self) -> None:
        """Before a step that reads pages: says where the keys start that its tokens see."""
        if self.by_head:
            start_LBN = self.length_B[:, None] + 1 - self.window_L1N
            torch.clamp(start_LBN, min=0, out=self.start_LBN)

    def holds(self, length: int, end: int) -> bool:
        """Whether what is seen after `length` tokens, padding included, is left, once `end` have been cached."""
        return all(layer.holds(length, end) for layer in self.layers)

    def rewind(self, length: int) -> None:
        """Goes back to `length` tokens, padding included, which it `holds`."""
        self.length_B.copy_((length - self.pad_B).clamp(min=0))
        self.is_empty = length == 0

    def reset(self) -> None:
        self.begin(self.pads)

    def bytes_read(self) -> int:
        """Bytes that a step reads of all layers."""
        return sum(layer.bytes_read() for layer in self.layers)
