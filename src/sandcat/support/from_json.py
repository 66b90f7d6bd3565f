"""Dataclasses from JSON that somebody else may have written."""

from __future__ import annotations

from typing import Any, TypeVar, get_type_hints

R = TypeVar("R")


def record(kind: type[R], data: dict[str, Any]) -> R:
    """A dataclass from JSON.

    Raises:
        TypeError: a field is missing or unknown, or its value is of another type.
    """
    made = kind(**data)
    for name, wanted in get_type_hints(kind).items():
        value = getattr(made, name)
        if not isinstance(value, int | float if wanted is float else wanted):
            raise TypeError(f"{name} is {value!r:.80}")
    return made
