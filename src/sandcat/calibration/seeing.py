"""What a site sees while a model, or one of its stages, runs. Reads only.

A stage is a decoder layer, or the final norm with the head (`ModelView.stages`). Shapes: T tokens, H inputs and O
outputs of a site, L positions of a window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sandcat.method import Seen
from sandcat.models.offload import at_hand, idle_layers, moved
from sandcat.models.view import ModelView, Site
from sandcat.support.hooks import after, before
from sandcat.support.progress import track

FIRST_POSITIONS = 4
"""Left out of every window: the first tokens carry massive activations that no other token has."""
WATCHED = "sandcat_watched"
"""An attention function of transformers: the model's own, whose queries and keys are looked at."""
_watching: ContextVar[tuple[Callable[[nn.Module, Tensor, Tensor], None], Callable]] = ContextVar("sandcat_watching")


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def first_states(view: ModelView, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[dict]]:
    """What enters the first layer for each batch, and each stage's other arguments: one row's, which fit any batch."""
    states: list[Tensor] = []
    kwargs: list[dict] = []

    def remember(module: nn.Module, args: tuple, kw: dict) -> None:
        kwargs.append({key: value for key, value in kw.items() if key != "hidden_states"})

    def capture(module: nn.Module, args: tuple, kw: dict) -> None:
        states.append(args[0] if args else kw["hidden_states"])
        raise _Stop

    with before([(layer, remember) for layer in view.layers]), idle_layers(view):
        view.model(batches[0][:1].to(view.model.device), use_cache=False, logits_to_keep=1)
    with before([(view.layers[0], capture)]):
        for batch in batches:
            with suppress(_Stop):
                view.model(batch.to(view.model.device), use_cache=False)
    return states, [*kwargs, {}]


def run_stage(view: ModelView, stage: Callable[..., Tensor], state: Tensor, kwargs: dict) -> Tensor:
    """A stage that is at hand, on a state that lies where its result will."""
    out = stage(state.to(view.device), **kwargs)
    return (out[0] if isinstance(out, tuple) else out).to(state.device)


def seen_at(module: nn.Module, run: Callable[[Tensor], Tensor], states: list[Tensor], needs: frozenset[str]) -> Seen:
    """What a module sees of all states, in one run of its stage for each, which ends when the module has seen it.

    Args:
        needs: of `method.NEEDS`, without gradients (see `backward`). Queries and keys are an attention module's.
    """
    seen = Seen()

    def enters(module: nn.Module, args: tuple, kw: dict) -> None:
        if "inputs" in needs:
            seen.inputs.append(_rows(args[0] if args else kw["hidden_states"]))
        if needs <= {"inputs"}:
            raise _Stop

    def leaves(module: nn.Module, args: tuple, kw: dict, out: Any) -> None:
        if "outputs" in needs:
            seen.outputs.append(_rows(out[0] if isinstance(out, tuple) else out))
        raise _Stop

    def attends(_: nn.Module, query: Tensor, key: Tensor) -> None:
        if "queries" in needs:
            seen.queries.append(query)
        if "keys" in needs:
            seen.keys.append(key)

    with ExitStack() as stack:
        stack.enter_context(before([(module, enters)]))
        stack.enter_context(after([(module, leaves)]))
        if needs & {"queries", "keys"}:
            stack.enter_context(_attention_watched(module, attends))
        for state in states:
            with suppress(_Stop):
                run(state)
    return seen


def _rows(x_BLH: Tensor) -> Tensor:
    return x_BLH[:, FIRST_POSITIONS:].flatten(0, 1)


@contextmanager
def _attention_watched(attention: nn.Module, watch: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Within this context an attention module shows what it multiplies: `watch(module, queries, keys)`."""
    config = attention.config
    own = config._attn_implementation
    eager = vars(sys.modules[type(attention).__module__]).get("eager_attention_forward")
    AttentionInterface.register(WATCHED, _attend)
    token = _watching.set((watch, ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)))
    config._attn_implementation = WATCHED
    try:
        yield
    finally:
        config._attn_implementation = own
        _watching.reset(token)


def _attend(module: nn.Module, query: Tensor, key: Tensor, *args, **kwargs):
    watch, attend = _watching.get()
    watch(module, query, key)
    return attend(module, query, key, *args, **kwargs)


def backward(view: ModelView, sites: Sequence[Site], windows_NL: Tensor, what: str) -> Iterator[tuple[int, dict]]:
    """Each stage from the last to that of the first site, and the inputs and gradients of its sites, by their names.

    The backward pass goes stage by stage: each is run again on what entered it, so that the graph of one stage, and the
    inputs and gradients of its sites, are all that is held at a time. A stage is at hand until the next is asked for.
    To be used outside of inference mode.

    Args:
        what: is said while it goes on.
    """
    first, last = min(site.layer for site in sites), len(view.layers)
    states, kwargs = first_states(view, windows_NL.split(1))
    entered = [states]  # by stage, what enters it in each window
    for index in track(range(last), "measuring what enters each layer"):
        with at_hand(view, index):
            run = partial(run_stage, view, view.stages[index], kwargs=moved(kwargs[index], view.device))
            entered.append([run(state) for state in entered[-1]])
    downstream: list[Tensor] = []
    for index in track(range(last, first - 1, -1), what):
        here = [site for site in sites if site.layer == index]
        with at_hand(view, index):
            if index == last:
                run = partial(_log_likelihood, view, windows_NL, torch.Generator().manual_seed(0))
            else:
                run = partial(_weighted, view, index, moved(kwargs[index], view.device), downstream)
            seen, downstream = _seen(here, run, entered.pop(), view.device)
            yield index, seen


def _log_likelihood(view: ModelView, ids_NL: Tensor, generator: torch.Generator, window: int, state: Tensor) -> Tensor:
    """That of tokens drawn from the model itself, which is what norm, head and all between them make of a state."""
    with idle_layers(view, last=state):
        log_p = (
            view.model(ids_NL[window, None].to(view.model.device), use_cache=False).logits[0].float().log_softmax(-1)
        )
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    return log_p.gather(1, drawn).sum()


def _weighted(
    view: ModelView, index: int, kwargs: dict, downstream: list[Tensor], window: int, state: Tensor
) -> Tensor:
    """A number that has, to what a layer gives, the gradient that the log-likelihood has."""
    out = run_stage(view, view.stages[index], state, kwargs)
    return (out * downstream[window]).sum()


def _seen(
    sites: list[Site], run: Callable[[int, Tensor], Tensor], states: list[Tensor], device: torch.device
) -> tuple[dict[str, Seen], list[Tensor]]:
    """What a stage's sites saw, and the gradients at its states.

    Args:
        run: gives, for a window and its state, what the gradients are of.
    """
    unique = {site.name: site for site in sites}.values()  # several methods may look at one
    found = {site.name: Seen() for site in unique}
    upstream: list[Tensor] = []
    for window, state in enumerate(states):
        outputs: dict[str, Tensor] = {}

        def see(name: str, module: nn.Module, args: tuple, kw: dict, out: Any, outputs=outputs) -> None:
            found[name].inputs.append(_rows((args[0] if args else kw["hidden_states"]).detach()))
            outputs[name] = out[0] if isinstance(out, tuple) else out

        with after([(site.module, partial(see, site.name)) for site in unique]), torch.enable_grad():
            state = state.to(device).detach().requires_grad_()
            at_state, *at_outputs = torch.autograd.grad(run(window, state), [state, *outputs.values()])
        upstream.append(at_state)
        for name, gradient in zip(outputs, at_outputs, strict=True):
            found[name].gradients.append(_rows(gradient))
    return found, upstream
