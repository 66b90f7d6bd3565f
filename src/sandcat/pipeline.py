"""The main job, check -> calibrate -> decide -> apply: the file to read first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sandcat.calibration import allocate as budgets
from sandcat.calibration import calibrate
from sandcat.checkpoints.quantizer import attach
from sandcat.data import Text, load_text
from sandcat.defaults import CALIBRATION_TOKENS
from sandcat.errors import BadRecipe
from sandcat.layers.packing import pack
from sandcat.method import Method
from sandcat.models.view import ModelView
from sandcat.plans.plan import Plan
from sandcat.plans.recipe import RECIPES, check, parse_recipe
from sandcat.plans.target import FORMS, Target

TARGET = "quality=ppl+1%"
"""Of a recipe that has no sparsities of its own: the words in `plan.RECIPES`."""


def sparsify(
    model: nn.Module,
    tokenizer,
    recipe: str | Method | Sequence[str | Method] = "sandcat",
    *,
    target: str | Target | None = None,
    allocate: str | None = None,
    calibration: str | Text = "self",
    calibration_tokens: int = CALIBRATION_TOKENS,
    sequential: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    dry_run: bool = False,
) -> Plan:
    """Makes `model` sparse in place, and returns what was decided.

    Afterwards `model.generate`, `model.save_pretrained` and `sandcat.save` work as before.

    Args:
        model: a causal language model of a family in `architectures.ARCHITECTURES`, dense.
        tokenizer: its tokenizer.
        recipe: methods, or their words: `[Cats(sparsity=0.5)]`, `"cats:sparsity=0.5"`; or `"sandcat"`, what is best.
        target: what all sites together have to meet, "sparsity=0.5", "bytes=0.72" or "quality=ppl+1%" (see `Target`);
            default: the methods' own sparsities, for `"sandcat"` the target `TARGET`.
        allocate: how a target is spread over the sites, "uniform", "equal-error" or "search" (the default).
        calibration: text to calibrate on; see `data.load_text`.
        calibration_tokens: how much of it.
        sequential: calibrate each layer on what the sparse layers before it give.
        seed: for calibration text that the model writes.
        device: where to calibrate, if the model is on the host and larger than that: its layers are brought there one
            at a time, and the model stays where it is. Default: where the model is.
        dry_run: decide only; the model stays as it is.

    Raises:
        UnsupportedModel, BadRecipe, PlanConflict, NothingMatched, DataError, BudgetError: before anything has changed.
    """
    methods, goal, how = asked(recipe, target, allocate)
    view = ModelView(model, None if device is None else torch.device(device))
    check(methods, view, overlap=how == "search")
    text = None
    if goal is not None or any(method.calibrated for method in methods):
        text = (
            calibration
            if isinstance(calibration, Text)
            else load_text(calibration, model, tokenizer, tokens=calibration_tokens, seed=seed)
        )
    if goal is None:
        plan, tensors = calibrate.decide(view, methods, text, sequential=sequential)
    else:
        assert text is not None and how is not None  # as there is a target
        plan, tensors = budgets.allocate(view, methods, text, goal, how, sequential=sequential)
    if not dry_run:
        plan.place(view, tensors)
        pack(model)
        attach(model, plan)
    return plan


def asked(
    recipe: str | Method | Sequence[str | Method], target: str | Target | None, allocate: str | None
) -> tuple[list[Method], Target | None, str | None]:
    """Methods, target and way of spreading it; the last two None where the methods' own sparsities hold.

    Raises:
        BadRecipe: as `parse_recipe`, `Target` and `allocate.check`; or a way of spreading, and no target.
    """
    words = recipe.split() if isinstance(recipe, str) else [recipe] if isinstance(recipe, Method) else list(recipe)
    methods = parse_recipe(recipe)
    if target is None and any(isinstance(word, str) and word in RECIPES for word in words):
        target = TARGET
    if target is None:
        if allocate is not None:
            raise BadRecipe(f"allocate={allocate} spreads a target: give one, {FORMS}.")
        return methods, None, None
    how = allocate or "search"
    budgets.check(methods, how)
    return methods, Target.parse(target) if isinstance(target, str) else target, how
