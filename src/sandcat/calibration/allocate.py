"""How much each site drops, so that all sites together meet a target.

`uniform`: every site the same. `equal-error`: every site as much as makes its output wrong by one common relative
error. `search`: where an estimate of the loss grows least for the bytes saved, site by site; and of the three the one
whose KL to the dense model is smallest on held-out text. Where two methods want one linear layer, `search` chooses.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from sandcat.calibration import calibrate
from sandcat.calibration.cost_curves import collect, savings
from sandcat.calibration.spreads import MOST, SPREADS, Spread, choose, least, options, saved, together
from sandcat.data import Text
from sandcat.errors import BadRecipe, BudgetError, suggest
from sandcat.layers.sparse_module import follow_prompts
from sandcat.measuring.bytes_read import read_bytes
from sandcat.measuring.quality import TextResult, evaluate_text
from sandcat.method import Decided, Method
from sandcat.models.offload import streaming
from sandcat.models.view import ModelView
from sandcat.plans.plan import Budget, HeldOut, Plan
from sandcat.plans.target import Target
from sandcat.support.processes import agreed, alone

HELD_OUT = 0.25
"""Share of the windows of calibration text on which losses are measured, and nothing is calibrated."""
PROBE_TOKENS = 4096
"""Tokens that thresholds are calibrated on, and that a loss is measured on, while a spread is still sought."""
TRIALS = 6
"""Budgets that are measured for a quality target."""


class Spending:
    """Ways to spend a budget on a model, which is left as it is: what its sites would lose and save, what a choice of
    theirs decides, and what that loses on text on which nothing was calibrated.

    Args:
        text: to calibrate on.
        measures: whether losses are measured, on a part of the text that is then held out.
        how: a name of `SPREADS`; with "uniform" bytes alone decide.
    """

    def __init__(
        self, view: ModelView, methods: list[Method], text: Text, how: str, *, measures: bool, sequential: bool
    ):
        self.view, self.methods, self.how, self.sequential = view, methods, how, sequential
        self.fit: Text = text
        self.held: Text | None = None
        if measures:
            self.fit, self.held = held_out_of(text)
        others = [method for method in methods if not method.has_sparsity]
        start = view
        if others:
            start = twin(view, *calibrate.decide(view, others, opening(self.fit), sequential=sequential))
        sites = [(method, site) for method in methods if method.has_sparsity for site in method.select(start)]
        whole_bytes = read_bytes(view.model)
        self.weighs = how != "uniform"
        with alone():  # on a few windows only
            curves: list[Any] = savings(start, sites, whole_bytes)
            if self.weighs:
                curves = collect(start, sites, self.fit, whole_bytes)
        self.curves = agreed(curves)
        self.at_first = read_bytes(start.model) / whole_bytes
        """The share of the bytes that is read before any site drops something."""
        self.most = sum(
            max(saved(option, [MOST] * len(option)) for option in options(group)) for group in together(self.curves)
        )
        """The largest saving."""

    def decide(self, spread: Spread, saving: float, text: Text) -> tuple[Plan, Decided]:
        """The plan that saves so much, calibrated on a text."""
        chosen = choose(self.curves, saving) if self.weighs else self.curves
        sparsities = {curve.site: 0.0 for curve in self.curves}
        sparsities |= {c.site: round(s, 6) for c, s in zip(chosen, spread(chosen, saving), strict=True)}
        return calibrate.decide(self.view, self.methods, text, sequential=self.sequential, sparsities=sparsities)

    def measured(self, spreads: list[Spread], saving: float) -> list[TextResult]:
        """What spreads lose on the beginning of the held-out text, calibrated on that of the other."""
        assert self.held is not None  # as there is something to compare
        plans = [self.decide(spread, saving, opening(self.fit)) for spread in spreads]
        return losses(self.view, plans, opening(self.held))

    def saving_for(self, target: Target) -> float:
        """How much has to be saved; for a quality the most with which the beginnings of the texts keep it.

        Raises:
            BudgetError: it cannot be.
        """
        if target.kind == "quality":
            spread = SPREADS[self.how]

            def keeps(kept: float) -> bool:
                return self.measured([spread], self.most - kept)[0].ratio <= 1 + target.value

            return self.most - least(keeps, self.most, TRIALS)
        saving = self.at_first - target.value if target.kind == "bytes" else target.value * self.most / MOST
        check_reachable(target, saving, self.at_first, self.most)
        return saving

    def spread_for(self, saving: float) -> Spread:
        """`how` the saving is spread; of a search the spread that loses least."""
        if self.how != "search":
            return SPREADS[self.how]
        results = self.measured(list(SPREADS.values()), saving)
        return min(zip(SPREADS.values(), results, strict=True), key=lambda pair: pair[1].kl)[0]

    def finished(self, spread: Spread, saving: float, target: Target) -> tuple[Plan, Decided]:
        """The plan that saves so much, calibrated on all of the text, and what it loses on what is held out."""
        plan, tensors = self.decide(spread, saving, self.fit)
        held_out = None
        if self.held is not None:
            result = losses(self.view, [(plan, tensors)], self.held)[0]
            held_out = HeldOut(result.tokens, result.ratio, result.kl)
        budget = Budget(str(target), self.how, round(self.at_first - saving, 6), held_out)
        return replace(plan, budget=budget), tensors


def allocate(
    view: ModelView, methods: list[Method], text: Text, target: Target, how: str, *, sequential: bool = True
) -> tuple[Plan, Decided]:
    """The plan that meets the target, and its tensors, as `calibrate.decide` gives them. The model is left as it is.

    Where methods want one linear layer, `how` has to be "search".

    Raises:
        BudgetError: no sparsities meet the target, or the text is too short to keep a part of it for measuring.
    """
    measures = how == "search" or target.kind == "quality"
    spending = Spending(view, methods, text, how, measures=measures, sequential=sequential)
    saving = spending.saving_for(target)
    spread = spending.spread_for(saving)
    plan, tensors = spending.finished(spread, saving, target)
    while target.kind == "quality" and perplexity_ratio(plan) > 1 + target.value:  # on all of the text it is worse
        saving -= 0.005
        if saving <= 0:
            raise BudgetError(f"{target} cannot be met: as little as a saving of 0.5 % of the bytes loses more.")
        plan, tensors = spending.finished(spread, saving, target)
    return plan, tensors


def perplexity_ratio(plan: Plan) -> float:
    """That of a plan on the text that was held out, which it has."""
    assert plan.budget is not None and plan.budget.held_out is not None
    return plan.budget.held_out.perplexity_ratio


def check(methods: list[Method], how: str) -> None:
    """Before anything is measured.

    Raises:
        BadRecipe: an unknown way, no method with a sparsity, or one that was given a sparsity beside the target.
    """
    if how not in SPREADS:
        raise BadRecipe(f"allocate={how!r} is unknown{suggest(how, list(SPREADS))} Known: {', '.join(SPREADS)}.")
    if not any(method.has_sparsity for method in methods):
        raise BadRecipe(
            f"a target needs a method with the option sparsity, as cats and teal are: {' '.join(map(str, methods))} "
            "has none."
        )
    for method in methods:
        if method.has_sparsity and method != method.at(type(method)().options()["sparsity"]):
            raise BadRecipe(
                f"{method} asks for one sparsity, and the target for what meets it: leave out one of the two."
            )


def check_reachable(target: Target, saving: float, at_first: float, most: float) -> None:
    """
    Raises:
        BudgetError: more than all sites can save, or less than is saved without them.
    """
    if saving < 0:
        raise BudgetError(f"{target}: without any sparsity this recipe comes to bytes={at_first:.3f}. Ask for fewer.")
    if saving > most:
        nearest = f"{target.kind}={at_first - most if target.kind == 'bytes' else MOST:.3f}"
        raise BudgetError(
            f"{target} cannot be met: with every site at a sparsity of {MOST} this recipe comes to {nearest}. Ask for "
            "that at most, or add methods or sites to the recipe."
        )


def held_out_of(text: Text) -> tuple[Text, Text]:
    """What to calibrate on, and what to measure on: the windows at the end.

    Raises:
        BudgetError: a single window.
    """
    count = len(text.ids_NL)
    held = max(1, round(HELD_OUT * count))
    if count < 2:
        raise BudgetError(
            f"{text.source} gives one window of text, and a part of it has to be kept for measuring the loss: give "
            "more calibration tokens, or a target sparsity or bytes with allocate=uniform or equal-error."
        )
    return text.part(0, count - held), text.part(count - held, count)


def opening(text: Text) -> Text:
    """The first windows, of about `PROBE_TOKENS` tokens."""
    return text.part(0, max(1, PROBE_TOKENS // text.ids_NL.shape[1]))


def losses(dense: ModelView, plans: list[tuple[Plan, Decided]], text: Text) -> list[TextResult]:
    """What each plan loses on a text."""
    twins = [twin(dense, plan, tensors) for plan, tensors in plans]
    with ExitStack() as stack:
        for view in (dense, *twins):
            stack.enter_context(streaming(view))
        return [result for result, _ in evaluate_text(dense.model, [view.model for view in twins], text)]


def twin(dense: ModelView, plan: Plan, tensors: Decided) -> ModelView:
    """Another model, with a plan in place, that shares the weights of the dense one."""
    model = copy.deepcopy(dense.model, {id(parameter): parameter for parameter in dense.model.parameters()})
    view = ModelView(model, dense.device if dense.offloaded else None)
    plan.place(view, tensors)
    follow_prompts(view.decoder)
    return view
