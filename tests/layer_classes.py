"""Every class of layer that can stand in a sparsified model, with recipes that put it there, for what must hold of all.

A class that has no recipe here fails `test_every_class_of_layer_has_a_recipe` (decoding/test_step.py).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import torch
from tiny import text, tiny
from torch import nn

import sandcat
from sandcat import layers
from sandcat.layers.op_module import Kernel, kernel_modules

RECIPES = {
    "Linear": [None],
    "StoredLinear": ["int8", "fp8"],
    "SparseLinear": ["teal", "int8 teal", "fp8 teal", "teal:batch=shared", "teal:dense_prompt=true"],
    "LowRankLinear": ["rsparse:alpha=[0.5]", "int8 rsparse:alpha=[0.5],sparsity=0.1"],
    "SparseMLP": ["cats", "int8 cats", "cats:batch=shared", "relufy", "teal:sites=[o,gate] cats"],
    "CoreMLP": ["coreinfer", "int8 coreinfer"],
}
"""Class -> recipes."""


def concrete(kind: type = Kernel) -> Iterator[type]:
    """The layers of sandcat that are made."""
    for file in pkgutil.iter_modules(layers.__path__):
        importlib.import_module(f"sandcat.layers.{file.name}")
    for found in kind.__subclasses__():
        if found.__module__.startswith("sandcat.") and not inspect.isabstract(found):
            yield found
        yield from concrete(found)


def with_class(name: str, recipe: str | None, family: str = "llama", **sizes) -> nn.Module:
    """A tiny model, in float32, that has such layers."""
    model = tiny(family, **sizes)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    kinds = {type(module).__name__ for module in kernel_modules(model).values()}
    assert name in (kinds or {"Linear"}), f"{recipe} makes {kinds}, not {name}"
    return model


def in_a_subclass(module: nn.Module) -> None:
    """Makes a module one of a subclass that computes something else."""
    kind = type(module)

    def forward(self, *args, **kwargs):
        found = kind.forward(self, *args, **kwargs)
        return found * 2 if isinstance(found, torch.Tensor) else found

    module.__class__ = type(f"Other{kind.__name__}", (kind,), {"forward": forward})
