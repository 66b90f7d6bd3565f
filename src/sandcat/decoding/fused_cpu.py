"""The fused step on a CPU: tables of addresses and sizes, made once, from which one compiled call runs all layers for
all sequences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sandcat.decoding.static_cache import DecodeCache
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.sparse_module import Sparse
from sandcat.layers.stored_linear import StoredLinear
from sandcat.layers.weights import stored_of
from sandcat.models.host_memory import use_large_pages
from sandcat.models.view import Block, ModelView
from sandcat.ops import CODED, FORMATS, MAX_TOKENS
from sandcat.ops.numba.primitives.activations import CODES
from sandcat.ops.numba.primitives.dtypes import STORAGE, unit_of
from sandcat.ops.numba.primitives.processor import HAS_TILES, ONE_BY_ONE
from sandcat.ops.numba.primitives.registers import LANES
from sandcat.ops.numba.primitives.rows_amx import room_of
from sandcat.ops.numba.primitives.threads import HAS_BARRIER, VERSION, threads_of
from sandcat.ops.numba.step import step
from sandcat.ops.numba.step.attention import parts_of
from sandcat.ops.numba.step.linears import is_summed


def applies(view: ModelView, blocks: list[Block], batch: int) -> bool:
    """Whether the kernel can run this model: all matrices are stored as it reads them."""
    table, head = view.model.get_input_embeddings().weight, view.model.get_output_embeddings()
    linears = [(linear, _rows(block, name)) for block in blocks for name, linear in _linears(block).items()]
    linears.append((head, _rows_of(head)))
    return (
        HAS_BARRIER
        and batch <= MAX_TOKENS
        and table.dtype in STORAGE
        and all(
            type(linear) in (nn.Linear, StoredLinear, SparseLinear)
            and rows.is_contiguous()
            and "cpu" in FORMATS[stored_of(linear).format].devices
            for linear, rows in linears
        )
    )


def _linears(block: Block) -> dict[str, nn.Module]:
    row, mlp = block.mlp.architecture, block.mlp.module
    names = {"gate": row.gate, "up": row.up, "down": row.down}
    return {"q": block.q, "k": block.k, "v": block.v, "o": block.o} | {k: getattr(mlp, n) for k, n in names.items()}


def _by_inputs(block: Block, name: str) -> bool:
    """Whether a layer's weight is stored [I, O]: where inputs can be skipped."""
    mlp = block.mlp.module
    return mlp.packed if name == "down" and type(mlp) is SparseMLP else _packed(_linears(block)[name])


def _packed(linear: nn.Module) -> bool:
    return isinstance(linear, Sparse) and linear.packed


def _rows(block: Block, name: str) -> Tensor:
    """The weight as it lies in memory."""
    weight = _linears(block)[name].weight
    return weight.t() if _by_inputs(block, name) else weight


def _rows_of(head: nn.Module) -> Tensor:
    return head.weight.t() if _packed(head) else head.weight


def _odd_lines(size: int) -> int:
    """At least so many float32, an odd number of cache lines: rows of them do not fall on each other in the cache."""
    return (-(-size // LANES) | 1) * LANES


class CpuStep:
    """The step on a CPU; see `step.Step`. It reads weights as they lie: where those that could be
    skipped are stored as a dense layer's, or skipping does not pay for so many sequences, it masks.
    """

    def __init__(self, view: ModelView, blocks: list[Block], cache: DecodeCache):
        model, decoder = view.model, view.decoder
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        self.dtype, self.vocabulary = table.dtype, len(table)
        batch, groups, length, size = cache.layers[0].keys.shape
        rows = batch if batch == 1 or ONE_BY_ONE else -(-batch // 4) * 4
        self.x_B1H = torch.empty(batch, 1, 0, dtype=self.dtype)
        self.formats: set[str] = set()
        self.held = [table.detach()]  # by its address, as it need not be contiguous
        heads, hidden = blocks[0].q.out_features // size, table.shape[1]
        neurons = max(_linears(block)["down"].in_features for block in blocks)
        most = _odd_lines(max(heads * size, hidden, neurons))
        stride = _odd_lines(max((heads + 2 * groups) * size, 2 * neurons, hidden, head.out_features))
        self.threads = threads_of()
        parts = parts_of(self.threads, batch * groups)
        tiles = HAS_TILES and batch > 1 and self.dtype == torch.bfloat16
        positions = torch.arange(length)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1, 1, hidden, dtype=self.dtype), position_ids=positions)
        self.tokens = torch.zeros(batch, dtype=torch.int64)
        self.state = torch.zeros(batch, hidden)
        self.logits = torch.zeros(batch, head.out_features, dtype=self.dtype)

        def rooms(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(self.threads, *shape, dtype=dtype)

        self.model = np.zeros(1, step.MODEL)
        self._fill(
            self.model[0], sequences=batch, rows=rows, tokens=self.tokens, position=cache.position,
            table=table.data_ptr(), table_row=table.stride(0), table_column=table.stride(1), vocabulary=len(table),
            cos=cos[0], sin=sin[0],
            h=self.state, qkv=torch.zeros(rows, (heads + 2 * groups) * size),
            partial=torch.zeros(batch, heads, parts, size + 2), parts=parts, hidden=torch.zeros(rows, most),
            scores=torch.zeros(rows, head.out_features), logits=self.logits, norm=decoder.norm.weight,
            eps=decoder.norm.variance_epsilon, layers=len(blocks), heads=heads, groups=groups, D=size, H=hidden,
            L=length, x=rooms(rows, most), y=rooms(rows, most), values=rooms(rows, most),
            kept=rooms(most, dtype=torch.int64), wanted=rooms(most, dtype=torch.bool), most=most,
            sums=rooms(rows, stride), stride=stride, room=rooms(room_of(most), dtype=torch.int32) if tiles else None,
            tiles=room_of(most),
        )  # fmt: skip
        by_inputs, skips = _packed(head), self._skips(head)
        self._fill_linear(self.model[0]["head"], head, _rows_of(head), by_inputs=by_inputs, skips=skips)
        self.layers = np.zeros(len(blocks), step.LAYER)
        for entry, block, cached in zip(self.layers, blocks, cache.layers, strict=True):
            self._fill_layer(entry, block, cached.keys, cached.values)
        use_large_pages(self.held)
        self.kernel = step.kernel(self.dtype, tiles, frozenset(self.formats & set(CODED)))
        self.arguments = [self.model.ctypes.data, self.layers.ctypes.data, VERSION]

    def _fill(self, entry: np.void, **fields: Tensor | float | None) -> None:
        """Writes numbers as they are, tensors as their addresses (and keeps them), None as 0."""
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = value.detach().contiguous()  # a weight may be stored anew while this memory is still read
                self.held.append(value)
                value = value.data_ptr()
            entry[name] = 0 if value is None else value

    def _skips(self, module: nn.Module) -> bool:
        """Whether what it drops is not read in a step of these sequences."""
        return isinstance(module, Sparse) and module.packed and not module.reads_all(self.x_B1H)

    def _masks(self, module: nn.Module) -> bool:
        """Whether it reads what it drops, and counts it as 0."""
        return isinstance(module, Sparse) and not self._skips(module)

    def _fill_linear(self, entry: np.void, linear: nn.Module, rows: Tensor, *, by_inputs: bool, skips: bool) -> None:
        is_sparse = isinstance(linear, Sparse)
        format = stored_of(linear).format
        self.formats.add(format)
        self._fill(
            entry, weight=rows, format=FORMATS[format].code, unit=float(unit_of(format)), scale=stored_of(linear).scale,
            bias=linear.bias, by_inputs=by_inputs, skips=skips, masks=self._masks(linear),
            threshold=linear.threshold if is_sparse else None, shared=is_sparse and linear.shares(self.x_B1H),
            summed=is_summed(by_inputs, skips, linear.out_features * rows.itemsize, self.threads),
            outputs=linear.out_features, inputs=linear.in_features,
        )  # fmt: skip

    def _fill_layer(self, entry: np.void, block: Block, keys: Tensor, values: Tensor) -> None:
        mlp = block.mlp.module
        skips, masks = self._skips(mlp), self._masks(mlp)
        linears = _linears(block)
        for name, linear in linears.items():
            by_inputs, skipping = _by_inputs(block, name), self._skips(linear) or (name == "down" and skips)
            self._fill_linear(entry[name], linear, _rows(block, name), by_inputs=by_inputs, skips=skipping)
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (block.q_norm, block.k_norm))
        self._fill(
            entry, input_norm=block.input_norm.weight, q_norm=q_norm, k_norm=k_norm, mlp_norm=block.mlp_norm.weight,
            keys=keys, values=values, window=block.window or keys.shape[2], skips=skips,
            masks=masks, shared=(skips or masks) and mlp.shares(self.x_B1H), neurons=linears["down"].in_features,
            activation=CODES[mlp.activation if type(mlp) is SparseMLP else block.mlp.activation],
            neuron_threshold=mlp.threshold if skips or masks else None, input_eps=block.input_norm.variance_epsilon,
            head_eps=0 if block.q_norm is None else block.q_norm.variance_epsilon,
            mlp_eps=block.mlp_norm.variance_epsilon, scaling=block.scaling,
        )  # fmt: skip

    def __call__(self, ids_B1: Tensor) -> Tensor:
        self.tokens.copy_(ids_B1[:, 0])
        least, most = self.tokens.aminmax()
        if not 0 <= least <= most < self.vocabulary:
            raise IndexError(f"tokens {self.tokens.tolist()}: one is outside the vocabulary of {self.vocabulary}.")
        self.kernel(self.arguments, self.threads)
        return self.logits
