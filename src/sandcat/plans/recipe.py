"""Recipes: methods in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sandcat.errors import BadRecipe, suggest
from sandcat.method import Method
from sandcat.methods import METHODS

RECIPES = {"sandcat": ("teal:sites=all+head", "cats:score=output")}
"""Words that stand for several methods. In `sandcat` both want up and down: `allocate` chooses, layer by layer."""


def method_class(name: str) -> type[Method]:
    """
    Raises:
        BadRecipe: no method of that name.
    """
    known = {method.name: method for method in METHODS}
    if name not in known:
        raise BadRecipe(f"there is no method {name!r}{suggest(name, list(known))} Known: {', '.join(known)}.")
    return known[name]


def parse(word: str) -> Method:
    """One word of a recipe, `name` or `name:option=value,option=value`, as a method.

    Raises:
        BadRecipe: an unknown method or option, or a bad value.
    """
    name, _, text = word.partition(":")
    options = {}
    for item in re.split(r",(?![^\[]*\])", text) if text else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise BadRecipe(f"{word!r}: {item!r} is not option=value, as in cats:sparsity=0.5,score=output.")
        if key.strip() in options:
            raise BadRecipe(f"{word!r}: {key.strip()} is given twice.")
        options[key.strip()] = value.strip()
    return method_class(name).from_options(options)


def parse_recipe(recipe: str | Method | Sequence[str | Method]) -> list[Method]:
    """Words, methods, or a mixture, as a list of methods; the word `sandcat` stands for `RECIPES["sandcat"]`.

    Raises:
        BadRecipe: as `parse`, or nothing in it.
    """
    items = recipe.split() if isinstance(recipe, str) else [recipe] if isinstance(recipe, Method) else list(recipe)
    if not items:
        raise BadRecipe("the recipe is empty: name at least one method, as in cats:sparsity=0.5.")
    words = [word for item in items for word in (RECIPES.get(item, [item]) if isinstance(item, str) else [item])]
    return [parse(word) if isinstance(word, str) else word for word in words]
