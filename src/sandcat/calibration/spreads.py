"""Spreads: how much each site of a model drops, so that all together save a share of the bytes, by what each loses and
saves at every sparsity (cost_curves.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np

from sandcat.calibration.cost_curves import LEVELS, Curve, Savings

STEPS = np.arange(0, 91) / 100
"""The sparsities that `least_loss` looks at."""
HIGHEST_PRICE = 1e9
"""Nats for all the bytes of a token: more than any are worth."""
MOST = LEVELS[-1]
"""The largest sparsity that a site can get."""

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
