"""Whether a step computes what the model does, layer by layer, each from the same inputs. What is wrong is not timed.

In a deep model roundings grow, and where one decides what is skipped two right steps differ at will. So each layer is
compared alone, given what it gets in the model, and by what it adds to the residual state, of which that is a small
part. What lies so near its threshold that a rounding may decide over it is kept on both sides.

Shapes: B sequences, T tokens of the prompt, H hidden size, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sandcat.decoding.decoder import Decoder
from sandcat.decoding.static_cache import DecodeCache
from sandcat.decoding.step import cache_of_step, fused_step
from sandcat.errors import ParityError
from sandcat.layers.cache import PagedCache
from sandcat.layers.op_module import kernel_modules
from sandcat.measuring.edges import off_the_edge, thresholded, thresholds_restored
from sandcat.models.view import ModelView

LAYER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Relative RMS difference, for each sequence, of what a layer adds, of what it caches, and of what the head gives."""
STEP_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
"""The same of a whole step's logits with all units: it finds layers that are put together in a wrong way, not a step
that rounds elsewhere, which in a deep model of random weights comes to 0.2 in bfloat16 (unrelated logits: 1.4)."""


def check_step(
    name: str, model: nn.Module, prompt: Tensor, ids_B1: Tensor, compile: str | None, logits: Tensor, eager: Tensor
) -> None:
    """Compares a compiled or fused step with the eager one, by its layers and as a whole.

    Args:
        prompt, ids_B1: what the step came after, [B, T], and what it was fed.
        compile: as `Decoder` takes it.
        logits, eager: what the step gave, and what the eager one gave.

    Raises:
        ParityError: it is another step.
    """
    if compile == "fused":
        check_layers(name, model, prompt, ids_B1)
    elif compile is not None and kernel_modules(model):  # what is not ours, the compiler answers for
        check_first_layer(name, model, prompt, ids_B1, compile)
    modules, tolerance = thresholded(model), STEP_TOLERANCE[model.dtype]
    if modules and not error_of(logits, eager) <= tolerance:
        with thresholds_restored(modules):
            for module in modules:
                module.threshold = torch.full_like(module.threshold, -1)
            eager, logits = (_decoder(model, prompt, mode).step(ids_B1) for mode in (None, compile))
        name += " (all units kept)"
    _check(name, "its logits are", logits, eager, tolerance)


@torch.inference_mode()
def check_layers(name: str, model: nn.Module, prompt: Tensor, ids_B1: Tensor, mask_BT: Tensor | None = None) -> None:
    """Compares each layer of a fused step, and its head, with those of the model.

    Args:
        mask_BT: of the prompt, as `Decoder.prefill` takes it.

    Raises:
        ParityError: one gives something else.
    """
    view, tolerance = ModelView(model), LAYER_TOLERANCE[model.dtype]
    decoder, states = _observed(model, prompt, ids_B1, mask_BT)
    for index, state_BH in enumerate(states):
        # the first one takes its input from the embedding table, as it does in the whole step
        fed = _table(model, state_BH) if index else nullcontext(ids_B1)
        with thresholds_restored(thresholded(model)), view.only(slice(index, index + 1)), fed as ids:
            alone = _only(decoder.cache, index)
            want = _eager_layer(model, ids, alone, decoder.padding(prompt.shape[1]))
            found, logits, after_BH = _fused_layer(model, ids, state_BH, _paged(model, alone, decoder))
            for what, a, b in zip(_Layer._fields, found, want, strict=True):
                _check(name, f"what layer {index} has as {what} is", a, b, tolerance)
            if index == len(states) - 1:
                normed = view.decoder.norm(after_BH.to(model.dtype))[:, None]
                _check(name, "what its head gives is", logits, model.get_output_embeddings()(normed)[:, 0], tolerance)


@torch.inference_mode()
def check_first_layer(name: str, model: nn.Module, prompt: Tensor, ids_B1: Tensor, compile: str) -> None:
    """Compares the logits of the model with its first layer alone, compiled and not: a compiler takes its time.

    Raises:
        ParityError: they differ.
    """
    with thresholds_restored(thresholded(model)), ModelView(model).only(slice(0, 1)):
        decoder = _decoder(model, prompt, None)
        with off_the_edge(model):
            want = decoder.step(ids_B1)
        found = _decoder(model, prompt, compile).step(ids_B1)
    _check(name, "what its first layer and its head give is", found, want, LAYER_TOLERANCE[model.dtype])


class _Layer(NamedTuple):
    """What a layer makes of a token: [B, key-value heads, D] twice, and what it adds to the residual state, [B, H]."""

    key: Tensor
    value: Tensor
    added: Tensor


def _decoder(model: nn.Module, prompt: Tensor, compile: str | None, mask_BT: Tensor | None = None) -> Decoder:
    decoder = Decoder(model, prompt.shape[1] + 1, batch=len(prompt), compile=compile, capture=False)
    decoder.prefill(prompt, mask_BT)
    return decoder


def _observed(model: nn.Module, prompt: Tensor, ids_B1: Tensor, mask_BT: Tensor | None) -> tuple[Decoder, list[Tensor]]:
    """A decoder after an eager step, and the residual state [B, H] before each layer."""
    decoder, states = _decoder(model, prompt, None, mask_BT), []
    with ExitStack() as stack:
        for layer in ModelView(model).layers:
            hook = layer.register_forward_pre_hook(lambda m, args: states.append(args[0][:, 0].clone()))
            stack.callback(hook.remove)
        decoder.step(ids_B1)
    return decoder, states


def _only(cache: Cache, index: int) -> DecodeCache:
    """A cache of one layer, as it was before the step."""
    keys, values = cache.layers[index].keys, cache.layers[index].values
    alone = DecodeCache(1, keys.shape[2], keys.device)
    layer = alone.layers[0]
    layer.lazy_initialization(keys, values)
    layer.keys.copy_(keys)
    layer.values.copy_(values)
    alone.position.fill_(keys.shape[2] - 1)
    return alone


def _paged(model: nn.Module, cache: DecodeCache, decoder: Decoder) -> PagedCache:
    """The same in pages, as the fused step takes it; what else is in these is NaN."""
    keys, values = cache.layers[0].keys, cache.layers[0].values
    paged = cache_of_step(model, keys.shape[2], len(keys))
    assert paged is not None  # it applies to the whole model
    paged.begin(decoder.cache.pads)
    paged.lay_out(keys)
    for pool in (paged.pool.keys, paged.pool.values):
        pool.fill_(torch.nan)
    paged.layers[0].update(keys[:, :, :-1], values[:, :, :-1])
    return paged


def _eager_layer(model: nn.Module, ids_B1: Tensor, cache: DecodeCache, padding: dict[str, Tensor]) -> _Layer:
    """What the model's only layer does; it moves thresholds off the edge."""
    block, added = next(ModelView(model).blocks()), []
    with ExitStack() as stack:
        stack.enter_context(off_the_edge(model))
        for module in (block.o, block.mlp.module):
            hook = module.register_forward_hook(lambda m, args, y: added.append(y[:, 0].float()))
            stack.callback(hook.remove)
        model(ids_B1, past_key_values=cache, use_cache=True, **padding)
    return _Layer(*_last(cache), sum(added))


def _last(cache: DecodeCache) -> tuple[Tensor, Tensor]:
    """The key and the value at the last position, which is free again, and holds NaN."""
    layer = cache.layers[0]
    cache.position.sub_(1)
    found = layer.keys[:, :, -1].clone(), layer.values[:, :, -1].clone()
    layer.keys[:, :, -1], layer.values[:, :, -1] = torch.nan, torch.nan
    return found


def _fused_layer(
    model: nn.Module, ids_B1: Tensor, state_BH: Tensor, cache: PagedCache
) -> tuple[_Layer, Tensor, Tensor]:
    """The same by the fused step, with its logits and the residual state that it ends with."""
    step = fused_step(model, cache)
    assert step is not None  # it applies to the whole model
    logits = step(ids_B1)
    after_BH = step.state.view(state_BH.shape)
    keys, values = cache.layers[0].gathered(cache.length_B.tolist())
    return _Layer(keys[:, :, -1], values[:, :, -1], after_BH - state_BH.float()), logits, after_BH


@contextmanager
def _table(model: nn.Module, state_BH: Tensor) -> Iterator[Tensor]:
    """Within this context tokens [B, 1], which it gives, are embedded as these states."""
    before = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding.from_pretrained(state_BH))
    try:
        yield torch.arange(len(state_BH), device=state_BH.device)[:, None]
    finally:
        model.set_input_embeddings(before)


def error_of(found: Tensor, want: Tensor) -> float:
    """Relative RMS difference."""
    found, want = found.double(), want.double()
    return float((found - want).norm() / want.norm())


def _check(name: str, what: str, found: Tensor, want: Tensor, tolerance: float) -> None:
    """Each sequence by itself: one that is wrong must not hide among right ones."""
    errors = [error_of(a, b) for a, b in zip(found, want, strict=True)]
    if not all(error <= tolerance for error in errors):
        raise ParityError(
            f"the {name} step differs from the eager one: {what} off by {max(errors):.1e} (relative RMS), and "
            f"{tolerance:.0e} is allowed. Nothing is timed. Please report model and machine."
        )
