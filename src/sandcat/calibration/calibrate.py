"""Calibration: shows each site what it will see, layer by layer, and lets the methods decide. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sandcat.calibration.seeing import backward, first_states, run_stage, seen_at
from sandcat.data import Text
from sandcat.layers.fingerprint import fingerprint
from sandcat.method import SLOTS, Decided, Method, Seen, Spec, Tensors
from sandcat.models.offload import at_hand, moved
from sandcat.models.view import ModelView, Site
from sandcat.plans.plan import Calibration, Plan, PlanStep
from sandcat.support import processes
from sandcat.support.progress import track

BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""


class Task(NamedTuple):
    """One method at one site."""

    method: Method
    site: Site
    own: Method
    """The method with the site's own sparsity."""


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
    What needs gradients is decided first of all, on the dense model, from its last layer to its first. The model is
    left as it was found, whatever happens. The tensors lie where the model does. Several processes share the batches,
    if there are enough, and all find the same.
    """
    by_stage = tasks(view, methods, sparsities)
    decisions = Decisions(view, sequential=sequential)
    if text is not None:
        decide_by_gradients(view, [task for here in by_stage.values() for task in here], text, decisions)
    stages = view.stages
    batches = [] if text is None else text.ids_NL.split(max(1, BATCH_TOKENS // text.ids_NL.shape[1]))
    few = len(batches) < processes.count()
    states: list[Any] = []
    kwargs: list[dict[str, Any]] = [{}] * len(stages)
    if batches:
        states, kwargs = first_states(view, batches if few else processes.mine(batches))
    last = max(by_stage, default=-1)
    for index in track(range(last + 1), "calibrating layers" if text is not None else "deciding"):
        run = partial(run_stage, view, stages[index], kwargs=moved(kwargs[index], view.device))
        here = by_stage.get(index, [])
        with processes.alone(few), at_hand(view, index), _restored(view, here):
            for task in here:
                if task not in decisions:
                    module = view.current(task.site).module
                    seen = seen_at(module, run, states, task.own.needs) if task.own.needs else Seen()
                    decisions.take(task, seen)
                decisions.put(task)
            if index < last:
                states = [run(state) for state in states]
    decisions.settle(methods)
    calibration = None if text is None else Calibration(text.source, text.sha256, text.tokens, sequential)
    steps = [PlanStep(method, decisions.specs.get(method, {})) for method in methods]
    return Plan([step for step in steps if step.sites or sparsities is None], calibration), decisions.tensors


def tasks(view: ModelView, methods: list[Method], sparsities: dict[str, float] | None) -> dict[int, list[Task]]:
    """What is to be decided at each stage, as methods apply and as the layer computes, whatever the recipe's order."""
    by_stage: dict[int, list[Task]] = {}
    order = {site.name: place for place, site in enumerate(view.sites())}
    for method in methods:
        for site in method.select(view):
            sparsity = (sparsities or {}).get(site.name) if method.has_sparsity else None
            if sparsity != 0:
                own = method if sparsity is None else method.at(sparsity)
                by_stage.setdefault(site.layer, []).append(Task(method, site, own))
    for here in by_stage.values():
        here.sort(key=lambda task: (SLOTS.index(task.method.slot), order[task.site.name]))
    return by_stage


class Decisions:
    """What has been decided, by method and site name."""

    def __init__(self, view: ModelView, *, sequential: bool):
        self.view, self.sequential, self.host = view, sequential, view.model.device
        self.specs: dict[Method, dict[str, Spec]] = {}
        self.tensors: Decided = {}

    def __contains__(self, task: Task) -> bool:
        return (task.method, task.site.name) in self.tensors

    def take(self, task: Task, seen: Seen) -> None:
        """Has the method decide, and keeps what it says."""
        self._keep(task.method, task.site, *task.own.decide(self.view.current(task.site), seen))

    def put(self, task: Task) -> None:
        """Puts a module in place, if what comes later is to see it."""
        method, name = task.method, task.site.name
        if method.whole_model:
            return
        module = self._built(method, task.site, self.specs[method][name], self.tensors[method, name])
        self.specs[method][name]["fingerprint"] = fingerprint(module)
        if self.sequential or method.slot == "weight":
            self.view.replace(task.site, module)

    def settle(self, methods: list[Method]) -> None:
        """What is decided for the model as a whole."""
        sites = {site.name: site for site in self.view.sites()}
        for method in methods:
            if not method.whole_model:
                continue
            found = {
                name: (spec, self.tensors.pop((method, name))) for name, spec in self.specs.pop(method, {}).items()
            }
            for name, (spec, tensors) in method.settle(self.view, found).items():
                self._keep(method, sites[name], spec, tensors)
                module = self._built(method, sites[name], spec, tensors)
                self.specs[method][name]["fingerprint"] = fingerprint(module)

    def _keep(self, method: Method, site: Site, spec: Spec, tensors: Tensors) -> None:
        self.specs.setdefault(method, {})[site.name] = dict(spec)
        self.tensors[method, site.name] = {name: tensor.to(self.host) for name, tensor in tensors.items()}

    def _built(self, method: Method, site: Site, spec: Spec, tensors: Tensors) -> nn.Module:
        module = method.build(self.view.current(site), spec)
        method.fill(module, tensors)
        return module


def decide_by_gradients(view: ModelView, every: list[Task], text: Text, decisions: Decisions) -> None:
    """Those of the tasks that need gradients; each process does all of them."""
    chosen = [task for task in every if "gradients" in task.own.needs]
    if not chosen:
        return
    with processes.alone(), torch.inference_mode(False), torch.no_grad():
        sites = [task.site for task in chosen]
        for index, seen in backward(view, sites, text.ids_NL, "measuring gradients at each layer"):
            for task in chosen:
                if task.site.layer == index:
                    decisions.take(task, seen[task.site.name])


@contextmanager
def _restored(view: ModelView, here: list[Task]) -> Iterator[None]:
    """Puts the modules of the sites back at the end."""
    try:
        yield
    finally:
        for task in reversed(here):  # an MLP before what was replaced inside it
            view.replace(task.site, task.site.module)
