"""What is known of a forward of a model: beforehand, while it runs, and what is kept with its cache. See prompts.py.

Shapes: B sequences, T tokens a sequence, I neurons.
"""

from __future__ import annotations

import threading
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sandcat.errors import GenerationError


class Prompt:
    """What is kept with a cache of the prompt that it holds."""

    def __init__(self):
        self.tokens: int | None = None
        """How long it is, padding included; None while that cannot be seen."""
        self.votes: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer, what its tokens have voted so far: see `CoreMLP.count_votes`."""
        self.cores: dict[int, Tensor] = {}
        """By layer, the neurons that decoding goes on with, bool [B, I]."""

    def begin(self) -> None:
        """The cache is empty again. Cores stay where a captured graph looks for them, to be overwritten."""
        self.tokens = None
        self.votes.clear()


class Told:
    """What is known beforehand of the forwards in a context.

    Args:
        prompt: the first so many tokens of each sequence are its prompt; None: what is read first is, in each cache.
        sparse: nothing runs with all units because it belongs to a prompt, but for what chooses its units there.
        together: whether the sequences of a forward share units where a method lets them (`batch=shared`): True at
            every position, False never, None in decode steps.
    """

    def __init__(self, prompt: int | None = None, *, sparse: bool = False, together: bool | None = None):
        self.prompt, self.sparse, self.together = prompt, sparse, together
        self.generates = False
        """Whether it is one call of `generate`: what it reads first belongs to the prompt, even on a filled cache."""
        self.cache: Any = None
        """Which cache it has read that into."""
        self.again = False
        """Whether what it reads of a prompt may have been read into that cache before, and was taken from it since."""


class Reading:
    """What modules ask about the forward that is running.

    Args:
        first: the first so many of its T tokens belong to prompts.
        kept: what is kept of their prompt.
        real_BT: which of its tokens are no padding, bool; None if there is none, or nobody said so.
        again: they are read again, and have voted.
        goes_on: something may follow; not where a row holds several sequences, whose votes are one another's.
        told: see `Told`.
    """

    def __init__(
        self, first: int, kept: Prompt, real_BT: Tensor | None, *, again: bool, goes_on: bool, told: Told | None
    ):
        self.first, self.kept, self.real_BT, self.again, self.goes_on = first, kept, real_BT, again, goes_on
        self.sparse = told is not None and told.sparse
        self.together = None if told is None else told.together


V = TypeVar("V")


class PerThread(Generic[V]):
    """A value for each thread. A graph that is traced knows no threads, and takes the value that was set last."""

    def __init__(self):
        self.values: dict[int, V] = {}
        self.last: V | None = None

    def __reduce__(self) -> tuple:
        """What a thread has set is not copied, nor pickled."""
        return PerThread, ()

    def get(self) -> V | None:
        if not torch.compiler.is_compiling():
            return self.values.get(threading.get_ident())
        if len(self.values) > 1:
            raise GenerationError("two threads generate with one compiled model. Let them take turns, or copy it.")
        return self.last

    def set(self, value: V | None) -> None:
        self.last = value
        if torch.compiler.is_compiling():
            return
        if value is None:
            self.values.pop(threading.get_ident(), None)
        else:
            self.values[threading.get_ident()] = value
