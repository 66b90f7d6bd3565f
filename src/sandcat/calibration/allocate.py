"""How much each site drops, so that all sites together meet a target.

`uniform`: every site the same. `equal-error`: every site as much as makes its output wrong by one common relative
error. `search`: where an estimate of the loss grows least for the bytes saved, site by site; and of the three the one
whose KL to the dense model is smallest on held-out text. Where two methods want one linear layer, `search` chooses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from sandcat.calibration import calibrate
from sandcat.calibration.cost_curves import LEVELS, Curve, Savings, collect, savings
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
STEPS = np.arange(0, 91) / 100
"""The sparsities that `least_loss` looks at."""
HIGHEST_PRICE = 1e9
"""Nats for all the bytes of a token: more than any are worth."""
MOST = LEVELS[-1]
"""The largest sparsity that a site can get."""
TRIALS = 6
"""Budgets that are measured for a quality target."""

S = TypeVar("S", bound=Savings)
Spread = Callable[[list[Curve], float], list[float]]


def uniform(curves: Sequence[Savings], saving: float) -> list[float]:
    """One sparsity for all sites, whatever it costs them."""
    sparsity = least(lambda sparsity: saved(curves, [sparsity] * len(curves)) >= saving, MOST)
    return [sparsity] * len(curves)


def equal_error(curves: list[Curve], saving: float) -> list[float]:
    """The sparsities at which the outputs of all sites have one relative error."""

    def at(error: float) -> list[float]:
        return [curve.sparsity_at(error) for curve in curves]

    return at(least(lambda error: saved(curves, at(error)) >= saving, max(float(c.error_L[-1]) for c in curves)))


def least_loss(curves: list[Curve], saving: float) -> list[float]:
    """The sparsities with the smallest estimate of the loss: all at one price of loss for bytes."""
    price = least(lambda price: saved(curves, at_price(curves, price)) >= saving, HIGHEST_PRICE)
    above = np.array(at_price(curves, price))
    below = np.array(at_price(curves, price * (1 - 1e-9)))  # where a site jumps, between its two values
    share = least(lambda share: saved(curves, below + share * (above - below)) >= saving, 1.0)
    return (below + share * (above - below)).tolist()


def at_price(curves: list[Curve], price: float) -> list[float]:
    """Each site's sparsity with the smallest loss less price times bytes saved."""
    return [float(STEPS[worth(curve, price).argmin()]) for curve in curves]


def worth(curve: Curve, price: float) -> np.ndarray:
    """Loss less price times bytes saved, at each of `STEPS`."""
    return curve.loss_at(STEPS) - price * curve.saved_at(STEPS)


def choose(curves: list[Curve], saving: float) -> list[Curve]:
    """Where methods want one linear layer, those of them with the smallest loss less price times bytes saved.

    The price is the one at which the choice saves enough.
    """
    groups = together(curves)

    def at(price: float) -> list[Curve]:
        return [curve for group in groups for curve in best(group, price)]

    return at(least(lambda price: saved(at(price), at_price(at(price), price)) >= saving, HIGHEST_PRICE))


def together(curves: Sequence[S]) -> list[list[S]]:
    """Groups of sites: those of different groups claim different linear layers."""
    groups: list[list[S]] = []
    for curve in curves:
        rivals = [g for g in groups if any(set(other.claims) & set(curve.claims) for other in g)]
        groups = [g for g in groups if g not in rivals] + [[*chain(*rivals), curve]]
    return groups


def options(group: list[S]) -> list[list[S]]:
    """The sites of each method of a group."""
    return [[c for c in group if c.method == method] for method in {c.method: None for c in group}]


def best(group: list[Curve], price: float) -> list[Curve]:
    """The sites of the method of a group that costs least at this price of a byte."""

    def cost(option: list[Curve]) -> float:
        return sum(float(worth(curve, price).min()) for curve in option)

    return min(options(group), key=cost)


SPREADS: dict[str, Spread] = {"uniform": uniform, "equal-error": equal_error, "search": least_loss}


def saved(curves: Sequence[Savings], sparsities: list[float]) -> float:
    """What these sparsities save, as a share of the bytes that a token reads of the dense model."""
    return sum(float(curve.saved_at(sparsity)) for curve, sparsity in zip(curves, sparsities, strict=True))


def least(holds: Callable[[float], bool], most: float, rounds: int = 100) -> float:
    """The least number from 0 to `most` for which something holds that then holds for all larger ones."""
    low, high = 0.0, most
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


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
