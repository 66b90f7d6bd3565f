"""Progress bars with the time left, for whatever takes longer than a moment. Silent unless the caller turns them on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sandcat.support.processes import first

T = TypeVar("T")
_shown: ContextVar[bool] = ContextVar("sandcat_progress", default=False)


@contextmanager
def shown(on: bool = True) -> Iterator[None]:
    """Within this context `track` draws on standard error, and so does transformers while it loads and saves."""
    token = _shown.set(on and first())
    try:
        yield
    finally:
        _shown.reset(token)


def are_shown() -> bool:
    """Whether progress is shown here."""
    return _shown.get()


def say(text: str) -> None:
    """A line on standard error, where progress is shown."""
    if are_shown():
        Console(stderr=True).print(text, style="dim", markup=False, highlight=False)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, one by one, with a bar if bars are shown. `total` where the items have no length."""
    if not are_shown():
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield from bars.track(items, description=description, total=total)
