"""Which prompt each forward of a model belongs to. Shapes: B sequences, T tokens a sequence."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from sandcat.errors import GenerationError

CORES = "sandcat_cores"
"""The attribute of a cache that holds the core neurons, by layer, of what it caches."""


class Prompts:
    """Keeps the core neurons of each generation with its cache, and hands them to the layers of a model.

    A forward with an empty cache, or with none, is a prompt. Any other goes on with the core that its cache holds, one
    token or several at once, so that it does not matter how tokens are grouped. What reorders a cache for beam search
    moves sequences among the beams of one prompt, whose core is the same.
    """

    def __init__(self):
        self.cores: dict[int, Tensor] = {}
        self.fresh = self.cacheless = True
        self.real: Tensor | None = None
        """Which tokens of a prompt are no padding, bool [B, T]; None if there is none, or nobody said so."""
        self.thread: int | None = None

    def enter(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each forward of the decoder."""
        given = {**dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args, strict=False)),
                 **kwargs}  # fmt: skip
        cache = given.get("past_key_values")
        cores = getattr(cache, CORES, None)
        self.cacheless = cache is None
        self.fresh = cache is None or ((cores is None or _may_ask(cache)) and int(cache.get_seq_length()) == 0)
        if cores is None and not self.fresh:
            raise GenerationError(
                "this cache holds tokens that other layers have read, so no core neurons were chosen from them. Give "
                "the whole prompt to this model, with an empty cache."
            )
        self.cores = {} if cores is None else cores
        if cache is not None and cores is None:
            setattr(cache, CORES, self.cores)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        self.real = _real_tokens(given.get("attention_mask"), tokens.shape[1]) if self.fresh else None
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()

    def leave(self, decoder: nn.Module, args: tuple, output: object) -> None:
        """After each forward: a cache that was made in it takes the cores."""
        cache = getattr(output, "past_key_values", None)
        if self.cacheless and cache is not None:
            setattr(cache, CORES, self.cores)

    def check_thread(self) -> None:
        if not torch.compiler.is_compiling() and self.thread != threading.get_ident():
            raise GenerationError(
                "two threads run this model at once, and its core neurons belong to one generation at a time. Give "
                "each thread a model of its own (copy.deepcopy), or let them take turns."
            )


def _may_ask(cache) -> bool:
    """Whether the length of a cache may be looked at: not while a step is compiled or captured, which is no prompt."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _real_tokens(mask: Tensor | dict | None, tokens: int) -> Tensor | None:
    """bool [B, T] from a mask of tokens, or from that of attention, in which a padding token does not see itself."""
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, :tokens].bool()
    own_BT = mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :tokens]
    return own_BT if own_BT.dtype == torch.bool else own_BT == 0
