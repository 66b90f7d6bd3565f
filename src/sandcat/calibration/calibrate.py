"""Calibration: shows each site what it will see, layer by layer, and lets the methods decide. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sandcat.data import Text
from sandcat.layers.fingerprint import fingerprint
from sandcat.method import SLOTS, Decided, Method, Spec
from sandcat.models.offload import at_hand, idle_layers, moved
from sandcat.models.view import ModelView, Site
from sandcat.plans.plan import Calibration, Plan, Step
from sandcat.support import processes
from sandcat.support.progress import track

FIRST_POSITIONS = 4
"""Left out of every window: the first tokens carry massive activations that no other token has."""
BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@torch.no_grad()
def decide(
    view: ModelView,
    methods: list[Method],
    text: Text | None,
    *,
    sequential: bool = True,
    sparsities: dict[str, float] | None = None,
) -> tuple[Plan, Decided]:
    """Every method's decision for every one of its sites, and the tensors that go with it, by method and site name.

    Args:
        text: what to calibrate on; None if no method is `calibrated`.
        sequential: show a layer what the layers before it give when they are sparse already; else what they give when
            nothing is skipped.
        sparsities: by site name, in place of the methods' own; a site at 0 skips nothing and is left out of the plan.

    Within a layer the weights are changed first, so that everything else is decided on the weights that will be read.
    The model is left as it was found, whatever happens. The tensors lie where the model does. Several processes share
    the batches, if there are enough, and all find the same.
    """

    def sparsity_of(method: Method, site: Site) -> float | None:
        return (sparsities or {}).get(site.name) if method.has_sparsity else None

    by_stage: dict[int, list[tuple[Method, Site]]] = {}
    for method in methods:
        for site in method.select(view):
            if sparsity_of(method, site) != 0:
                by_stage.setdefault(site.layer, []).append((method, site))
    order = {site.name: place for place, site in enumerate(view.sites())}
    for here in by_stage.values():  # as they apply and as the layer computes them, whatever the recipe's order
        here.sort(key=lambda pair: (SLOTS.index(pair[0].slot), order[pair[1].name]))
    specs: dict[Method, dict[str, Spec]] = {method: {} for method in methods}
    tensors: Decided = {}

    def settle(method: Method, site: Site, x_TH: list[Tensor]) -> None:
        site = view.current(site)
        sparsity = sparsity_of(method, site)
        at = method if sparsity is None else method.at(sparsity)
        spec, found = at.decide(site, x_TH)
        module = method.build(site, spec)
        method.fill(module, found)
        tensors[method, site.name] = {name: tensor.to(host) for name, tensor in found.items()}
        specs[method][site.name] = {**spec, "fingerprint": fingerprint(module)}
        if sequential or method.slot == "weight":
            view.replace(site, module)

    host, stages = view.model.device, view.stages
    batches = [] if text is None else text.ids_NL.split(max(1, BATCH_TOKENS // text.ids_NL.shape[1]))
    few = len(batches) < processes.count()
    states: list[Any] = []
    kwargs: list[dict[str, Any]] = [{}] * len(stages)
    if batches:
        states, kwargs = first_states(view, batches if few else processes.mine(batches))
    last = max(by_stage, default=-1)
    for index in track(range(last + 1), "calibrating layers" if text is not None else "deciding"):
        run = partial(run_stage, view, stages[index], kwargs=moved(kwargs[index], view.device))
        with processes.alone(few), at_hand(view, index), _restored(view, by_stage.get(index, [])):
            for method, site in by_stage.get(index, []):
                inputs = _inputs(run, view.current(site).module, states) if method.calibrated else []
                settle(method, site, inputs)
            if index < last:
                states = [run(state) for state in states]
    calibration = None if text is None else Calibration(text.source, text.sha256, text.tokens, sequential)
    steps = [Step(method, specs[method]) for method in methods if specs[method] or sparsities is None]
    return Plan(steps, calibration), tensors


@contextmanager
def _restored(view: ModelView, sites: list[tuple[Method, Site]]) -> Iterator[None]:
    """Puts the modules of the sites back at the end."""
    try:
        yield
    finally:
        for _, site in reversed(sites):  # an MLP before what was replaced inside it
            view.replace(site, site.module)


def first_states(view: ModelView, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[dict]]:
    """What enters the first layer for each batch, and each stage's other arguments: one row's, which fit any batch."""
    states: list[Tensor] = []
    kwargs: list[dict] = []

    def remember(module: nn.Module, args: tuple, kw: dict) -> None:
        kwargs.append({key: value for key, value in kw.items() if key != "hidden_states"})

    def capture(module: nn.Module, args: tuple, kw: dict) -> None:
        states.append(args[0] if args else kw["hidden_states"])
        raise _Stop

    with _hooks([(layer, remember) for layer in view.layers]), idle_layers(view):
        view.model(batches[0][:1].to(view.model.device), use_cache=False, logits_to_keep=1)
    with _hooks([(view.layers[0], capture)]):
        for batch in batches:
            try:
                view.model(batch.to(view.model.device), use_cache=False)
            except _Stop:
                continue
    return states, [*kwargs, {}]


def _inputs(run: Callable[[Tensor], Tensor], module: nn.Module, states: list[Tensor]) -> list[Tensor]:
    """What `module` gets, [T, H] for each batch, without the first positions of each window."""
    seen: list[Tensor] = []

    def capture(module: nn.Module, args: tuple, kw: dict) -> None:
        seen.append(args[0][:, FIRST_POSITIONS:].flatten(0, 1))
        raise _Stop

    with _hooks([(module, capture)]):
        for state in states:
            try:
                run(state)
            except _Stop:
                continue
    return seen


def run_stage(view: ModelView, stage: Callable[..., Tensor], state: Tensor, kwargs: dict) -> Tensor:
    """A stage that is at hand, on a state that lies where its result will."""
    out = stage(state.to(view.device), **kwargs)
    return (out[0] if isinstance(out, tuple) else out).to(state.device)


@contextmanager
def _hooks(pairs: list[tuple[nn.Module, object]]) -> Iterator[None]:
    """Forward pre-hooks (module, args, kwargs), always removed."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
