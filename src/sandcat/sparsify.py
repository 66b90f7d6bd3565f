"""The main job, check -> calibrate -> decide -> apply: the file to read first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sandcat import calibrate
from sandcat.architectures import ModelView
from sandcat.data import Text, load_text
from sandcat.method import Method, Tensors
from sandcat.plan import Plan, check, parse_recipe
from sandcat.registration import attach, pack

CALIBRATION_TOKENS = 32_768


def sparsify(
    model: nn.Module,
    tokenizer,
    recipe: str | Method | Sequence[str | Method],
    *,
    calibration: str | Text = "self",
    calibration_tokens: int = CALIBRATION_TOKENS,
    sequential: bool = True,
    seed: int = 0,
    dry_run: bool = False,
) -> Plan:
    """Makes `model` sparse in place, and returns what was decided.

    Afterwards `model.generate`, `model.save_pretrained` and `sandcat.save` work as before.

    Args:
        model: a causal language model of a family in `architectures.ARCHITECTURES`, dense.
        tokenizer: its tokenizer.
        recipe: methods, or their words: `[Cats(sparsity=0.5)]`, `"cats:sparsity=0.5"`.
        calibration: text to calibrate on; see `data.load_text`.
        calibration_tokens: how much of it.
        sequential: calibrate each layer on what the sparse layers before it give.
        seed: for calibration text that the model writes.
        dry_run: decide only; the model stays as it is.

    Raises:
        UnsupportedModel, BadRecipe, PlanConflict, NothingMatched, DataError: before anything has changed.
    """
    methods = parse_recipe(recipe)
    view = ModelView(model)
    check(methods, view)
    text = None
    if any(method.calibrated for method in methods):
        text = calibration
        if isinstance(text, str):
            text = load_text(text, model, tokenizer, tokens=calibration_tokens, seed=seed)
    plan, tensors = calibrate.decide(view, methods, text, sequential=sequential)
    if not dry_run:
        apply(view, plan, tensors)
        attach(model, plan)
    return plan


def apply(view: ModelView, plan: Plan, tensors: dict[tuple[Method, str], Tensors]) -> None:
    """Builds, fills and puts in place what the plan says: the only step that changes the model."""
    for method, site, spec in plan.match(view):
        site = view.current(site)
        module = method.build(site, spec)
        method.fill(module, tensors[method, site.name])
        module.train(site.module.training)
        view.replace(site, module)
        if site.kind == "head":
            view.untie()
    pack(view.model)
