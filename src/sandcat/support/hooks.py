"""Hooks that are always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def before(pairs: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within this context each module's forward is preceded by its hook (module, args, kwargs)."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def after(pairs: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within this context each module's forward is followed by its hook (module, args, kwargs, output)."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield
