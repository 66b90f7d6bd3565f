"""Several processes with a copy of the model each, as `torchrun` and `accelerate launch` start them: they share the
work, and put together what they found so that it is what one process would have found, to the last bit.

Work is a list of batches in a fixed order; process p of n takes batches p, p + n, p + 2n, ... Counts are
added, which is exact in any order; sums of floats are added batch by batch in the list's order. What travels is small
(histograms, figures, one tensor a batch), so it goes by gloo between hosts' memories, whatever the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from datetime import timedelta
from itertools import chain, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("sandcat_processes", default=None)
_NOTHING = object()


@contextmanager
def together() -> Iterator[None]:
    """Within this context the processes share the work of calibration, evaluation and tasks; only the first one prints.

    All of them have to run the same code. Without a launcher there is one process, and nothing changes.
    """
    started = not dist.is_initialized()
    if started and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    patience = timedelta(days=1)  # others wait while the first one measures speed and saves
    if started:
        dist.init_process_group("gloo", timeout=patience)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    group = dist.group.WORLD if started else dist.new_group(backend="gloo", timeout=patience)
    token = _group.set(group)
    try:
        if first():
            yield
        else:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
                yield
    finally:
        _group.reset(token)
        if started:
            dist.destroy_process_group()


@contextmanager
def alone(condition: bool = True) -> Iterator[None]:
    """Within this context each process does all of the work itself, if the condition holds (for all of them)."""
    token = _group.set(None if condition else _group.get())
    try:
        yield
    finally:
        _group.reset(token)


def count() -> int:
    """How many work together; 1 outside of `together`."""
    return 1 if _group.get() is None else dist.get_world_size(_group.get())


def rank() -> int:
    """The number of this one; 0 outside of `together`."""
    return 0 if _group.get() is None else dist.get_rank(_group.get())


def first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's share."""
    return items[rank() :: count()]


def everyones(value: T) -> list[T]:
    """What each process has, in their order. Tensors have to lie on the host."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, _group.get())
    return values


def in_order(found: Sequence[T]) -> list[T]:
    """What all processes found for their shares, in the order of the whole list."""
    turns: Any = zip_longest(*everyones(found), fillvalue=_NOTHING)
    return [item for item in chain(*turns) if item is not _NOTHING]


def agreed(value: T) -> T:
    """What the first process has, for all: where rounding could make them differ."""
    return _from(0, value)


def total(of: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Tensor:
    """The sum of a function over all processes' batches, in the order of the whole list, one part at a time."""
    if count() == 1:
        return sum(map(of, batches))
    own, whole = iter(batches), 0
    for index in range(sum(everyones(len(batches)))):
        turn = index % count()
        part = _from(turn, of(next(own)).cpu() if turn == rank() else None)
        whole = whole + part.to(batches[0].device)
    return whole


def wait() -> None:
    """Until all processes are here."""
    everyones(None)


def _from(source: int, value: Any) -> Any:
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_group.get(), group_src=source)
    return values[0]
