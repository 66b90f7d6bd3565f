"""Models larger than the device: the weights stay on the host, and a part is brought over while it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sandcat.models.view import ModelView


def move(data: Tensor, device: torch.device) -> Tensor:
    """The only thing that brings weights over."""
    return data.to(device)


def moved(value: Any, device: torch.device) -> Any:
    """Arguments of a layer with all their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if type(value) in (tuple, list) else value


@contextmanager
def at_hand(view: ModelView, stage: int) -> Iterator[None]:
    """Within this context a stage of `view.stages` can run on `view.device`; afterwards its weights lie where they lay.

    They are copied over and the copies are dropped: nothing is copied back, as nothing here writes into weights.
    """
    tensors = [t for module in view.parts(stage) for t in (*module.parameters(), *module.buffers())]
    before = {tensor: tensor.data for tensor in tensors} if view.offloaded else {}
    try:
        for tensor, data in before.items():
            tensor.data = move(data, view.device)
        yield
    finally:
        for tensor, data in before.items():
            tensor.data = data


@contextmanager
def streaming(view: ModelView) -> Iterator[None]:
    """Within this context the model can run as a whole: norm and head are at hand, and each layer for its turn."""
    with ExitStack() as stack:
        if view.offloaded:
            stack.enter_context(at_hand(view, len(view.layers)))
            table = view.model.get_input_embeddings()  # which is on the device too if the head is tied to it
            follow = table.register_forward_pre_hook(lambda table, args: moved(args, table.weight.device))
            stack.callback(follow.remove)
            for index, layer in enumerate(view.layers):
                turn = stack.enter_context(ExitStack())

                def begin(layer: nn.Module, args: tuple, kwargs: dict, index: int = index, turn: ExitStack = turn):
                    turn.enter_context(at_hand(view, index))
                    return moved(args, view.device), moved(kwargs, view.device)

                def end(layer: nn.Module, args: tuple, output: Any, turn: ExitStack = turn) -> None:
                    turn.close()

                stack.callback(layer.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(end).remove)
        yield


@contextmanager
def idle_layers(view: ModelView, last: Tensor | None = None) -> Iterator[None]:
    """Within this context layers hand on what they get; the last one gives `last`, if that is there.

    So a model shows what it gives its layers, or what it makes of a state, at no cost.
    """

    def hand_on(hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    before = [vars(layer).get("forward") for layer in view.layers]
    for layer in view.layers:
        layer.forward = hand_on
    if last is not None:
        layer.forward = lambda *args, **kwargs: last
    try:
        yield
    finally:
        for layer, forward in zip(view.layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
