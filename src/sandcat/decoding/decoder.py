"""A model with a cache of fixed size and a step that is fused, compiled or captured in a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from sandcat.decoding.static_cache import DecodeCache
from sandcat.decoding.step import Step, fused_step
from sandcat.errors import DataError, UnsupportedModel
from sandcat.models.rotary import forget_length, grows, length_to_read_again


class Decoder:
    """A model with a cache of fixed size and one step for one more token a sequence.

    It computes in the model's own dtype, as cache and fused steps have one: `torch.autocast` does not reach it.

    Args:
        model: a causal language model.
        max_length: prompt and new tokens together, at most.
        batch: sequences, all of one length and without padding.
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
        self.cache = DecodeCache(layers, max_length, model.device)
        self.forward: Callable[[Tensor], Tensor] | Step = self._forward
        self.compile = compile
        self.prepared = False
        self.again = length_to_read_again(model.config)
        self.read_BN = torch.empty(batch, 0, dtype=torch.long)
        """What was read, for a model that reads it again."""
        self.fused: Step | None = None
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
        """`cache.position`, without asking the device."""

    def _forward(self, ids_B1: Tensor) -> Tensor:
        return self.model(ids_B1, past_key_values=self.cache, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Reads a prompt into the empty cache; the logits [B, vocabulary] of its last token."""
        if ids_BT.shape[1] > self.max_length:
            raise DataError(
                f"the prompt has {ids_BT.shape[1]} tokens, more than the {self.max_length} that were set aside."
            )
        if self.length:
            self.cache.reset()
        forget_length(self.model)
        ids_BT = ids_BT.to(self.model.device)
        if self.again is not None:
            self.read_BN = ids_BT
        with self._own_dtype():
            out = self.model(ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self._set_length(ids_BT.shape[1])
        return out.logits[:, -1]

    @torch.inference_mode()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Adds one token to each sequence; the logits [B, vocabulary] that follow (overwritten by the next step)."""
        if self.length >= self.max_length:
            raise DataError(f"the cache of {self.max_length} tokens is full.")
        if self.again is not None:
            self.read_BN = torch.cat([self.read_BN[:, : self.length], ids_B1.to(self.model.device)], 1)
            if self.length == self.again:
                return self.prefill(self.read_BN)
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
        self.fused = fused_step(self.model, self.cache)
        self.forward = self.fused or self.forward

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
        """Forgets all but the first `length` tokens."""
        if self.again is not None and length <= self.again < self.length:  # these keys were turned by other factors
            self.prefill(self.read_BN[:, :length])
            return
        forget_length(self.model)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.length = length
        self.cache.position.fill_(length)
