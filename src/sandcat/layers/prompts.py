"""Which tokens of a forward belong to a prompt: the one place that says so, and that every module asks.

What a token uses must not depend on how it was grouped with others, so it is never told from the shape of a forward.

- Within `model.generate` the prompt is what was given to it, however it is read: whole, in chunks, beside drafts that
  are verified, or again for each token without a cache.
- Else what enters an empty cache, or none, is a prompt, and one token on a cache that is filled is decoded. Several on
  a filled cache may be either: `modes.prompt_of` says.

Shapes: B sequences, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sandcat.errors import GenerationError
from sandcat.layers.reading import PerThread, Prompt, Reading, Told

PROMPT = "sandcat_prompt"
"""The attribute of a cache that holds the `Prompt` of what it caches."""

AMBIGUOUS = (
    "{tokens} tokens a sequence go on with a cache that is filled: nothing says whether they belong to a prompt, as "
    "its next chunk does, or are decoded, as drafts are, and this model computes the two otherwise. Use "
    "model.generate, or say how long the prompt is: with sandcat.layers.modes.prompt_of(model, tokens)."
)
PACKED = (
    "the prompt's neurons are chosen from one sequence a row, and this row holds several (position_ids begin anew, or "
    "cu_seq_lens_q is given). Give each sequence a row of its own, padded on the left."
)
PAGED = (
    "continuous batching (generate_batch) puts prompts and decoded tokens of many requests into one row, and does not "
    "say which is which; a method of this model (dense_prompt=true, or coreinfer) has to know. Use model.generate, or "
    "a plan with dense_prompt=false."
)
COMPILED = (
    "a compiled or captured forward cannot look how far its cache is filled, so nothing says whether its tokens belong "
    "to a prompt. Read the prompt by an ordinary forward, whole (no prefill_chunk_size, or disable_compile=True), and "
    "compile the steps after it."
)
FOREIGN = (
    "this cache holds tokens that other layers have read, so no core neurons were chosen from them. Give the whole "
    "prompt to this model, with an empty cache."
)
REWOUND = (
    "this cache was cut back to {start} tokens, within a prompt of {tokens} whose tokens have chosen the core neurons "
    "together. Begin a prompt with an empty cache."
)


class Prompts:
    """Follows the forwards of one decoder, by hooks, for the modules inside it.

    Threads do not see each other's forwards: what has to last is kept with the cache. What reorders a cache for beam
    search moves sequences among the beams of one prompt, whose core is the same.

    Args:
        chooses: some module chooses its units in a prompt.
        matters: some module does something else for a prompt of any length than for what is decoded.
    """

    in_steps = True
    """Fused steps do what its hooks do: nothing, as they add decoded tokens."""

    def __init__(self, *, chooses: bool, matters: bool):
        self.chooses, self.matters = chooses, matters
        self.told: PerThread[Told] = PerThread()
        self.now: PerThread[Reading] = PerThread()
        """The forward that runs in this thread; None outside of forwards, where a module takes its tokens for a
        prompt: so does the second forward of gradient checkpointing, in a thread of its own."""

    @contextmanager
    def tell(self, told: Told) -> Iterator[None]:
        """Within this context this thread's forwards are of what is told."""
        before = self.told.get()
        self.told.set(told)
        try:
            yield
        finally:
            self.told.set(before)

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """Within this context modules that a step calls by themselves, in no forward, take their tokens for decoded
        ones."""
        self.now.set(Reading(0, Prompt(), None, again=False, goes_on=False, told=None))
        try:
            yield
        finally:
            self.now.set(None)

    def enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each forward of the decoder."""
        names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache, told = given.get("past_key_values"), self.told.get()
        if given.get("cache") is not None and (self.chooses or (self.matters and not (told and told.sparse))):
            raise GenerationError(PAGED)
        kept = getattr(cache, PROMPT, None) or Prompt()
        first, start = self._first(given, cache, kept, told, *tokens.shape[:2])
        real_BT, again, packed = None, False, self.chooses and first > 0 and _is_packed(given)
        if self.chooses and first:
            again = start + first <= (kept.tokens or 0)
            if start < (kept.tokens or 0) and not (again and told is not None and told.again):
                raise GenerationError(REWOUND.format(start=start, tokens=kept.tokens))
            if packed and (cache is not None or first < tokens.shape[1]):
                raise GenerationError(PACKED)
            real_BT = _real_tokens(given.get("attention_mask"), start, tokens.shape[1])
        if first:
            kept.tokens = max(kept.tokens or 0, start + first)
        if cache is not None and not hasattr(cache, PROMPT):
            setattr(cache, PROMPT, kept)
        if told is not None and told.cache is None:
            told.cache = cache
        self.now.set(Reading(first, kept, real_BT, again=again, goes_on=not packed, told=told))

    def leave(self, decoder: nn.Module, args: tuple, output: object) -> None:
        """After each forward, whether it raised or not: a cache that was made in it takes what is kept."""
        reading, cache, told = self.now.get(), getattr(output, "past_key_values", None), self.told.get()
        if told is not None and told.cache is None:  # some models do not take the empty cache that `generate` gives
            told.cache = cache
        if reading is not None and reading.goes_on and cache is not None and not hasattr(cache, PROMPT):
            setattr(cache, PROMPT, reading.kept)
        self.now.set(None)

    def _first(
        self, given: dict, cache: Any, kept: Prompt, told: Told | None, sequences: int, tokens: int
    ) -> tuple[int, int]:
        """How many first tokens of a forward belong to prompts, and how many tokens came before it."""
        if not self._asks(told, sequences, tokens):
            return 0, 0
        if cache is None:
            return _cacheless(given, told, tokens), 0
        length = cache.get_seq_length()
        if isinstance(length, Tensor) and _is_recorded():
            if tokens == 1 and hasattr(cache, PROMPT) and (told is None or told.prompt is None):
                return 0, 0
            raise GenerationError(COMPILED)
        start = int(length)
        if start == 0:
            kept.begin()
        elif self.chooses and not kept.cores:
            raise GenerationError(FOREIGN)
        return _cached(cache, start, told, tokens), start

    def _asks(self, told: Told | None, sequences: int, tokens: int) -> bool:
        """Whether some module has to know; of those whose sequences share units, in what could be a decode step."""
        if self.chooses:
            return True
        if told is not None and told.sparse:
            return False
        return self.matters or (sequences > 1 and tokens == 1)


def _cacheless(given: dict, told: Told | None, tokens: int) -> int:
    """All of it, or what a context says; `generate` without a cache gives prompt and tokens since, again and again."""
    if told is None or (told.generates and given.get("use_cache") is not False):
        return tokens
    if told.prompt is None:
        told.prompt = tokens
    return min(told.prompt, tokens)


def _cached(cache: Any, start: int, told: Told | None, tokens: int) -> int:
    """Of a forward that goes on with a cache."""
    if told is not None and (not told.generates or told.cache is None or told.cache is cache):
        if told.prompt is not None:
            return min(max(told.prompt - start, 0), tokens)
        if told.generates and told.cache is None:
            return tokens
    if start == 0:
        return tokens
    if tokens > 1:
        raise GenerationError(AMBIGUOUS.format(tokens=tokens))
    return 0


def _is_recorded() -> bool:
    """Whether a graph is traced or captured, in which the length of a cache on the device may not be looked at."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_packed(given: dict) -> bool:
    """Whether a row holds several sequences, one after another."""
    if given.get("cu_seq_lens_q") is not None:
        return True
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is None or mask is not None or positions.dim() != 2 or torch.compiler.is_compiling():
        return False
    return bool((positions[:, 1:] < positions[:, :-1]).any())


def _real_tokens(mask: Tensor | dict | None, start: int, tokens: int) -> Tensor | None:
    """bool [B, T] from a mask of tokens, or from that of attention, in which a padding token does not see itself.

    Raises:
        GenerationError: a mask of a window alone does not say it of tokens after its first ones.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next((m for m in mask.values() if isinstance(m, Tensor)), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, start : start + tokens].bool()
    if mask.shape[-1] < start + tokens:
        raise GenerationError(
            "which tokens of this part of a prompt are padding cannot be seen in the mask of a sliding window. Read "
            "the prompt whole (no prefill_chunk_size), or with a dynamic cache."
        )
    own_BT = mask[:, 0].diagonal(start, -2, -1)[:, :tokens]
    return own_BT if own_BT.dtype == torch.bool else own_BT == 0


def is_in_steps(hook: object) -> bool:
    """Whether fused steps do what a hook of a module does, as its owner says."""
    return bool(getattr(getattr(hook, "__self__", None), "in_steps", False))
