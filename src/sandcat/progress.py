"""Progress bars with the time left, for whatever takes longer than a moment. Silent unless the caller turns them on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
_bars: ContextVar[Progress | None] = ContextVar("sandcat_progress", default=None)


@contextmanager
def shown() -> Iterator[None]:
    """Within this context, `track` draws on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        token = _bars.set(bars)
        try:
            yield
        finally:
            _bars.reset(token)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, one by one, with a bar if bars are shown. `total` where the items have no length."""
    bars = _bars.get()
    if bars is None:
        yield from items
        return
    task = bars.add_task(description, total=len(items) if total is None else total)
    try:
        for item in items:
            yield item
            bars.advance(task)
    finally:
        bars.remove_task(task)
