"""A model with a cache of fixed size and a step that is fused, compiled or captured in a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from sandcat.decoding.static_cache import DecodeCache
from sandcat.decoding.step import DecodeStep, cache_of_step, fused_step
from sandcat.errors import DataError, UnsupportedModel
from sandcat.layers.cache import PagedCache
from sandcat.models.rotary import forget_length, grows, length_to_read_again, steady_length


class Decoder:
    """A model with a cache of fixed size and one step for one more token a sequence.

    It computes in the model's own dtype, as cache and fused steps have one: `torch.autocast` does not reach it.

    Args:
        model: a causal language model.
        max_length: prompt and new tokens together, at most; padding counts.
        batch: how many sequences there are.
        compile: "fused" runs the step by `decoding.step` where it applies, None eagerly, and anything else is the mode
            for `torch.compile` without its own graphs, such as "default" or "max-autotune-no-cudagraphs".
        capture: on CUDA the step is captured in a CUDA graph, which pays from the first few steps on.

    Raises:
        UnsupportedModel: `compile` is a mode of `torch.compile`, and the model's rotary factors grow with the text.
    """

    def __init__(
        self, model: nn.Module, max_length: int, *, batch: int = 1, compile: str | None = "fused", capture: bool = True
    ):
        self.model, self.max_length, self.batch = model, max_length, batch
        layers = model.config.get_text_config().num_hidden_layers
        paged = cache_of_step(model, max_length, batch) if compile == "fused" else None
        self.cache: PagedCache | DecodeCache = paged or DecodeCache(layers, max_length, model.device)
        self.forward: Callable[[Tensor], Tensor] | DecodeStep = self._forward
        self.compile = compile
        self.prepared = False
        self.pages = torch.empty(0)
        """That the fused step is made for."""
        self.again = length_to_read_again(model.config)
        self.reads_again = self.again is not None or not self.cache.holds(0, max_length)
        self.read_BN = torch.empty(batch, 0, dtype=torch.long)
        """What was read, where it may have to be read again."""
        self.mask_BL: Tensor | None = None
        """bool [B, max_length]: False where a sequence is padded; None where none is."""
        self.fused: DecodeStep | None = None
        if compile not in (None, "fused"):
            if grows(model.config):
                raise UnsupportedModel(
                    f"compile={compile}: the rotary embedding of this model is dynamic, another with each token, and "
                    "a compiled step is the same for all. Leave out --compile (compile='fused')."
                )
            self.forward = torch.compile(self._forward, mode=None if compile == "default" else compile, fullgraph=True)
        self.capture = capture and model.device.type == "cuda" and not grows(model.config)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.length = 0
        """What the cache has of the longest sequence, without asking the device."""

    def _forward(self, ids_B1: Tensor) -> Tensor:
        padding = self.padding(self.cache.get_seq_length())
        return self.model(ids_B1, past_key_values=self.cache, use_cache=True, **padding).logits[:, -1]

    def padding(self, length: Tensor | int) -> dict[str, Tensor]:
        """What transformers has to be told of padding in a step after so many tokens, where there is any."""
        if self.mask_BL is None:
            return {}
        position_B1 = length - (~self.mask_BL).sum(1, keepdim=True)
        return {"attention_mask": self.mask_BL, "position_ids": position_B1}

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Reads prompts into the empty cache; the logits [B, vocabulary] of their last tokens.

        Args:
            mask_BT: as tokenizers give it, 0 where a sequence that is shorter than others is padded, on the left; None
                where all have one length.

        Raises:
            DataError: not `batch` prompts, or longer than `max_length`, or padded elsewhere; or padded ones for
                a model whose rotary embedding depends on the length.
        """
        if len(ids_BT) != self.batch:
            raise DataError(f"{len(ids_BT)} prompts for a decoder of {self.batch}: Decoder(..., batch={len(ids_BT)}).")
        if ids_BT.shape[1] > self.max_length:
            raise DataError(
                f"the prompt has {ids_BT.shape[1]} tokens, more than the {self.max_length} that were set aside."
            )
        self.cache.begin(self._pad(ids_BT, mask_BT))
        forget_length(self.model)
        ids_BT = ids_BT.to(self.model.device)
        if self.reads_again:
            self.read_BN = ids_BT
        padding = {}
        if self.mask_BL is not None:
            mask_BT = self.mask_BL[:, : ids_BT.shape[1]]
            padding = {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
        with self._own_dtype():
            out = self.model(ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **padding)
        if isinstance(self.cache, PagedCache) and self.cache.pool.keys is not self.pages:  # the step knows others
            self.pages, self.prepared, self.graph = self.cache.pool.keys, False, None
        self._set_length(ids_BT.shape[1])
        return out.logits[:, -1]

    def _pad(self, ids_BT: Tensor, mask_BT: Tensor | None) -> list[int]:
        """Keeps the mask of the prompts; how much padding each has."""
        B, T = ids_BT.shape
        mask_BT = torch.ones(B, T, dtype=torch.bool) if mask_BT is None else mask_BT.bool().cpu()
        pad_B = T - mask_BT.sum(1) if mask_BT.shape == ids_BT.shape else None
        if pad_B is None or not torch.equal(mask_BT, torch.arange(T) >= pad_B[:, None]) or bool((pad_B == T).any()):
            raise DataError(
                f"the mask of prompts of {T} tokens is {mask_BT.int().tolist()}: there must be 0 for padding before a "
                "sequence, and 1 for its tokens, at least one. Pad on the left (tokenizer.padding_side = 'left')."
            )
        steady = steady_length(self.model.config)
        if pad_B.any() and steady is not None and self.max_length > steady:
            raise DataError(
                f"prompts of different lengths, and more than {steady} tokens in all: there the rotary embedding of "
                "this model changes with the length, so that together they would be read otherwise than each alone. "
                "Read them one by one."
            )
        self._mask(torch.arange(self.max_length) >= pad_B[:, None] if pad_B.any() else None)
        return pad_B.tolist()

    def _mask(self, mask_BL: Tensor | None) -> None:
        """Keeps the mask where a captured step looks for it; one that was captured without a mask has no such place."""
        if mask_BL is not None and self.mask_BL is not None:
            self.mask_BL.copy_(mask_BL)
        elif mask_BL is not None or self.mask_BL is not None:
            self.mask_BL = None if mask_BL is None else mask_BL.to(self.model.device)
            self.graph = self.graph if self.fused else None

    @torch.inference_mode()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Adds one token to each sequence; the logits [B, vocabulary] that follow (overwritten by the next step)."""
        if self.length >= self.max_length:
            raise DataError(f"the cache of {self.max_length} tokens is full.")
        if self.reads_again:
            self.read_BN = torch.cat([self.read_BN[:, : self.length], ids_B1.to(self.model.device)], 1)
            if self.length == self.again:
                return self.prefill(self.read_BN)  # which is of one length, see `_pad`
        with self._own_dtype():
            return self._step(ids_B1)

    def _own_dtype(self) -> AbstractContextManager:
        device = self.model.device.type
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def _step(self, ids_B1: Tensor) -> Tensor:
        if self.compile == "fused" and not self.prepared:
            self._fuse()
        if self.capture:
            if self.graph is None:
                self.graph = self._capture(ids_B1)
            self.ids_B1.copy_(ids_B1)
            self.graph.replay()
            logits = self.logits
        else:
            logits = self.forward(ids_B1.to(self.model.device))
        self.length += 1
        return logits

    def _fuse(self) -> None:
        """Takes the fused step where it applies; the cache must hold a prompt."""
        self.prepared = True
        self.fused = fused_step(self.model, self.cache) if isinstance(self.cache, PagedCache) else None
        self.forward = self.fused or self._forward
        self.capture = self.capture and (self.fused is not None or not isinstance(self.cache, PagedCache))

    def _capture(self, ids_B1: Tensor) -> torch.cuda.CUDAGraph:
        """Compiles and warms the step up, captures it, and sets the cache back to where it was."""
        self.ids_B1 = ids_B1.clone()
        position, before = self.cache.position, self.cache.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward(self.ids_B1)
                position.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # a graph of before that is freed while this one is captured would spoil it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.forward(self.ids_B1)
        self.held = [weight.detach() for weight in self.model.parameters()]  # a weight may be stored anew (`pack`)
        position.copy_(before)
        return graph

    @torch.inference_mode()
    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens, padding included."""
        turned_otherwise = self.again is not None and length <= self.again < self.length
        if turned_otherwise or not self.cache.holds(length, self.length):
            mask_BT = None if self.mask_BL is None else self.mask_BL[:, :length].clone()
            self.prefill(self.read_BN[:, :length], mask_BT)
            return
        forget_length(self.model)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.length = length
        self.cache.rewind(length)
