"""Options of a method: a field each, from which command line, JSON and docs are made."""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import field
from typing import Any

from sandcat.errors import BadRecipe, suggest


def option(default: Any, help: str) -> Any:
    """A field of a method: written once, here; the command line, the JSON and the docs are made from it."""
    return field(default=default, metadata={"help": help})


@functools.cache  # a search makes hundreds of methods
def field_type(cls: type, name: str) -> Any:
    """The type of a method's option."""
    return typing.get_type_hints(cls)[name]


def type_text(kind: Any) -> str:
    """A type as help and docs write it."""
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        return " | ".join(type_text(k) for k in typing.get_args(kind))
    return "list" if typing.get_origin(kind) is tuple else kind.__name__


def coerce(method: str, name: str, kind: Any, value: Any) -> Any:
    """A value, or its text, as the type of its field; raises BadRecipe."""
    if typing.get_origin(kind) is typing.Literal:
        known = list(typing.get_args(kind))
        if value not in known:
            raise BadRecipe(
                f"{method}: {name}={value!r} is unknown{suggest(str(value), known)} Known: {', '.join(known)}."
            )
        return value
    try:
        if isinstance(kind, types.UnionType):  # text or a list
            if isinstance(value, str) and value.strip("[]") != value:
                value = [item.strip() for item in value.strip("[]").split(",") if item.strip()]
            item_type = typing.get_args(typing.get_args(kind)[1])[0]
            return value if isinstance(value, str) else tuple(item_type(item) for item in value)
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError):
        raise BadRecipe(
            f"{method}: {name}={value!r} is not {'a' if kind is not int else 'an'} {type_text(kind)}."
        ) from None
