"""The fused step on a CPU: a program of records, made once, that a compiled call runs for all layers and sequences."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from sandcat.decoding.cpu_parts import Sizes, Writer
from sandcat.decoding.cpu_program import Call, Program
from sandcat.decoding.layer_parts import model_parts
from sandcat.layers.cache import PagedCache
from sandcat.layers.sparse_module import prompts_of
from sandcat.models.host_memory import use_large_pages
from sandcat.models.view import ModelView
from sandcat.ops import MAX_TOKENS
from sandcat.ops.numba.primitives import products
from sandcat.ops.numba.primitives.dtypes import STORAGE
from sandcat.ops.numba.primitives.processor import HAS_TILES, ONE_BY_ONE
from sandcat.ops.numba.primitives.registers import LANES
from sandcat.ops.numba.primitives.rows_amx import room_of
from sandcat.ops.numba.primitives.threads import HAS_BARRIER, VERSION, threads_of
from sandcat.ops.numba.step import records, step


def applies(view: ModelView, batch: int) -> bool:
    """Whether the kernel can run this model."""
    return HAS_BARRIER and batch <= MAX_TOKENS and view.model.get_input_embeddings().weight.dtype in STORAGE


def _odd_lines(size: int) -> int:
    """At least so many float32, an odd number of cache lines: rows of them do not fall on each other in the cache."""
    return (-(-size // LANES) | 1) * LANES


class CpuStep:
    """The step on a CPU; see `DecodeStep`. It reads weights as they lie: where those that could be
    skipped are stored as a dense layer's, or skipping does not pay for so many sequences, it masks.
    """

    def __init__(self, view: ModelView, cache: PagedCache):
        table, parts = view.model.get_input_embeddings().weight, model_parts(view, cache)
        batch, groups, D = cache.layers[0].shape
        rows = batch if batch == 1 or ONE_BY_ONE else -(-batch // 4) * 4
        self.sizes = Sizes(batch, rows, table.shape[1], parts.heads * D, groups * D, parts.neurons, table.dtype)
        self.vocabulary, self.threads, self.prompts = len(table), threads_of(), prompts_of(view.model)
        self.cache, self.tokens = cache, torch.zeros(batch, dtype=torch.int64)
        self.state = torch.zeros(batch, table.shape[1])
        self.logits = torch.zeros(batch, parts.vocabulary, dtype=table.dtype)
        tiles = HAS_TILES and batch > 1 and table.dtype == torch.bfloat16
        self.program = Program(self.threads, table.dtype, tiles=tiles)
        self.program.held += [table.detach(), cache.pool.keys, cache.pool.values]  # by their addresses
        writer = Writer(self.program, self.sizes, self.logits)
        writer.write(parts)
        self.model = self._model(view, cache, writer)
        use_large_pages(self.program.held)
        self.kernel = step.kernel()
        self.records, self.runs = self.program.finished()

    def __call__(self, ids_B1: Tensor) -> Tensor:
        self.tokens.copy_(ids_B1[:, 0])
        least, most = self.tokens.aminmax()
        if not 0 <= least <= most < self.vocabulary:
            raise IndexError(f"tokens {self.tokens.tolist()}: one is outside the vocabulary of {self.vocabulary}.")
        self.cache.begin_step()
        model = self.model.ctypes.data
        for first, count, call in self.runs:
            self.kernel([model, first, count, VERSION], self.threads)
            if call is not None:
                self._call(call)
        return self.logits

    def _call(self, call: Call) -> None:
        with nullcontext() if self.prompts is None else self.prompts.decoded():
            call.taken.copy_(call.module(call.given))

    def _model(self, view: ModelView, cache: PagedCache, writer: Writer) -> np.ndarray:
        """What all records of the program read."""
        table, decoder = view.model.get_input_embeddings().weight, view.decoder
        batch, rows, H, Q, K, neurons, dtype = self.sizes
        _, groups, D = cache.layers[0].shape
        vocabulary, heads, tiles = self.logits.shape[1], Q // D, self.program.tiles
        most = _odd_lines(max(Q, H, neurons))
        stride = _odd_lines(max(Q + 2 * K, 2 * neurons, H, vocabulary))
        positions = torch.arange(cache.max_length)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1, 1, H, dtype=dtype), position_ids=positions)

        def rooms(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(self.threads, *shape, dtype=dtype)

        model = np.zeros(1, records.MODEL)
        self.program.fill(
            model[0], sequences=batch, rows=rows, tokens=self.tokens, lengths=cache.length_B,
            table=table.data_ptr(), table_row=table.stride(0), table_column=table.stride(1), vocabulary=self.vocabulary,
            cos=cos[0], sin=sin[0], h=self.state, qkv=writer.qkv,
            partial=torch.zeros(batch * groups + self.threads, heads // groups, D + 2), hidden=torch.zeros(rows, most),
            between=torch.zeros(rows, writer.rank), rank=writer.rank,
            scores=torch.zeros(rows, vocabulary), logits=self.logits, outputs=vocabulary, heads=heads, groups=groups,
            D=D, H=H, L=cache.max_length, x=rooms(rows, most), y=rooms(rows, most), values=rooms(rows, most),
            kept=rooms(most, dtype=torch.int64), wanted=rooms(most, dtype=torch.bool), most=most,
            sums=rooms(rows, stride), stride=stride, tiles=room_of(most) if tiles else 0,
            room=rooms(room_of(most), dtype=torch.int32) if tiles else None,
            pack=products.function(products.PACK, STORAGE[table.dtype], tiles=True) if tiles else None,
        )  # fmt: skip
        return model
