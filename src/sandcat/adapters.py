"""Adapters (PEFT's LoRA) on a sparse model: what they train is what merging them gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sandcat.errors import UnsupportedModel
from sandcat.layers.low_rank_linear import LowRankLinear
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.weights import stored_of


def follow_masks(model: nn.Module) -> nn.Module:
    """Shows every adapter around a layer that skips input channels only the channels that the layer keeps.

    So an adapter and its merged form compute the same: without it the adapter sees channels that the merged weight will
    not read. Adapters inside a sparse MLP need nothing: they see masked neurons anyway.

    Args:
        model: what `peft.get_peft_model` or `PeftModel.from_pretrained` gave; changed in place, and returned.

    Raises:
        UnsupportedModel: a layer of rsparse, whose factors stand for the weight as it was.
    """

    def mask(adapted: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (adapted.base_layer.masked(args[0]), *args[1:])

    for name, base, module in _adapted(model):
        if isinstance(base, LowRankLinear):
            raise UnsupportedModel(
                f"{name} is a layer of rsparse, whose low-rank factors stand for its weight as it was, and would not "
                "follow an adapter. Adapt other layers, or train on the model sparsified by teal."
            )
        if isinstance(base, SparseLinear):
            module.register_forward_pre_hook(mask)
    return model


def merge(model: Any) -> nn.Module:
    """The sparse model with its adapters merged into the weights, as `merge_and_unload` gives it.

    Raises:
        UnsupportedModel: an adapter stands on codes, which hold no small changes.
    """
    for name, base, _ in _adapted(model):
        if (format := stored_of(base).format) != "float":
            raise UnsupportedModel(
                f"{name} has {format} weights, and an adapter cannot be merged into those. Keep the adapter beside "
                f"them, or train it on the model sparsified without {format}, merge it there, and sparsify the merged "
                "model."
            )
    return model.merge_and_unload()


def _adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, base layer and module of every adapter."""
    for name, module in model.named_modules():
        if (base := getattr(module, "base_layer", None)) is not None:
            yield name, base, module
