"""The main job, check -> calibrate -> decide -> apply -> save -> measure: the file to read first.

`sparsify` does the first half on a model in memory; `make` does it all, from a model's name to a folder and its report,
for the command line and for sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sandcat.calibration import allocate as budgets
from sandcat.calibration import calibrate
from sandcat.checkpoints.card import model_card
from sandcat.checkpoints.load import load, verify
from sandcat.checkpoints.quantizer import attach
from sandcat.checkpoints.save import save
from sandcat.data import Text, check_ids, load_text
from sandcat.defaults import CALIBRATION_TOKENS
from sandcat.errors import BadRecipe, DeviceError
from sandcat.layers.packing import pack
from sandcat.method import Decided, Method
from sandcat.models.rotary import forget_length
from sandcat.models.unwrapped import check_unwrapped
from sandcat.models.view import ModelView
from sandcat.plans.check import check
from sandcat.plans.plan import Plan
from sandcat.plans.recipe import RECIPES, parse_recipe
from sandcat.plans.target import FORMS, Target
from sandcat.reports.measure import measure_saved
from sandcat.reports.report import Report
from sandcat.reports.wanted import Wanted
from sandcat.support import processes
from sandcat.support.devices import pick_device
from sandcat.support.whole_folder import check_free
from sandcat.support.write import replace_text

TARGET = "quality=ppl+1%"
"""Of a recipe that has no sparsities of its own: the words in `plans.recipe.RECIPES`."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be made of a model, and on what it is calibrated; the fields are arguments of `sparsify`.

    Raises:
        BadRecipe: as `parse_recipe`, `Target` and `allocate.check`; or a way of spreading, and no target.
    """

    recipe: str | Method | Sequence[str | Method] = "sandcat"
    target: str | Target | None = None
    allocate: str | None = None
    calibration: str | Text = "self"
    calibration_tokens: int = CALIBRATION_TOKENS
    sequential: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goal is not None:
            budgets.check(self.methods, self.how)
        elif self.allocate is not None:
            raise BadRecipe(f"allocate={self.allocate} spreads a target: give one, {FORMS}.")

    @property
    def methods(self) -> list[Method]:
        """Those of the recipe, parsed; raises BadRecipe."""
        return parse_recipe(self.recipe)

    @property
    def goal(self) -> Target | None:
        """What all sites together have to meet; None where the methods' own sparsities hold."""
        recipe, target = self.recipe, self.target
        words = recipe.split() if isinstance(recipe, str) else [recipe] if isinstance(recipe, Method) else list(recipe)
        if target is None and any(isinstance(word, str) and word in RECIPES for word in words):
            target = TARGET
        return Target.parse(target) if isinstance(target, str) else target

    @property
    def how(self) -> str:
        """How a target is spread over the sites."""
        return self.allocate or "search"

    @property
    def calibrated(self) -> bool:
        """Whether it takes text."""
        return self.goal is not None or any(method.calibrated for method in self.methods)

    def check(self, view: ModelView) -> None:
        """
        Raises:
            UnsupportedModel, PlanConflict, NothingMatched, BadRecipe: this model cannot have it.
        """
        check(self.methods, view, overlap=self.goal is not None and self.how == "search")

    def text(self, model: nn.Module, tokenizer) -> Text | None:
        """What it is calibrated on; None if nothing is.

        Raises:
            DataError: as `data.load_text`.
        """
        if not self.calibrated:
            return None
        if isinstance(self.calibration, Text):
            check_ids(self.calibration.ids_NL, model, self.calibration.source)
            return self.calibration
        return load_text(self.calibration, model, tokenizer, tokens=self.calibration_tokens, seed=self.seed)

    def decide(self, view: ModelView, text: Text | None) -> tuple[Plan, Decided]:
        """The plan and its tensors; the model stays as it is.

        Raises:
            BudgetError: the target cannot be met.
        """
        forget_length(view.model)
        if self.goal is None:
            return calibrate.decide(view, self.methods, text, sequential=self.sequential)
        assert text is not None  # as a target is measured
        return budgets.allocate(view, self.methods, text, self.goal, self.how, sequential=self.sequential)


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
        model: a causal language model of a family in `families.ARCHITECTURES`, dense.
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
    order = Order(
        recipe=recipe, target=target, allocate=allocate, calibration=calibration,
        calibration_tokens=calibration_tokens, sequential=sequential, seed=seed,
    )  # fmt: skip
    check_unwrapped(model)
    view = ModelView(model, None if device is None else torch.device(device))
    order.check(view)
    plan, tensors = order.decide(view, order.text(model, tokenizer))
    if not dry_run:
        apply(view, plan, tensors)
    return plan


def apply(view: ModelView, plan: Plan, tensors: Decided) -> None:
    """Puts a plan in place; until here the model is as it was."""
    view.own_config()
    plan.place(view, tensors)
    pack(view.model)
    attach(view.model, plan)


def make(
    model: str,
    order: Order,
    folder: Path,
    *,
    wanted: Wanted | None,
    offload: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Report | None:
    """Makes a model sparse, saves it to `folder`, loads it again, and measures it beside the dense one.

    Everything that a user can have wrong is looked at before the first long step. The report lies in the folder too.

    Args:
        model: a folder, a hub id, or `embedded.EMBEDDED`.
        order: what to make of it.
        wanted: what to measure; None: nothing.
        offload: keep the model on the host, and calibrate on `device` one layer at a time.
        overwrite: replace a model folder that exists.
        device, dtype, trust_remote_code: as in `load`.

    Returns:
        The report; None if nothing was to be measured.

    Raises:
        CheckpointError, DeviceError, ParityError; and as `sparsify` and `measure`.
    """
    check_free(folder, overwrite)
    place, device = calibration_device(device, offload)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if wanted is not None:
        wanted = replace(wanted, tasks=wanted.questions())
    dense, tokenizer = load(model, to_sparsify=True, **where)
    check_unwrapped(dense)
    view = ModelView(dense, place)
    order.check(view)
    if wanted is not None:
        wanted = wanted.loaded(dense, tokenizer)
    text = order.text(dense, tokenizer)
    if wanted is not None and text is not None:
        wanted.check_apart(text)
        wanted = replace(wanted, curve_text=text)
    plan, tensors = order.decide(view, text)
    apply(view, plan, tensors)
    if processes.first():
        save(
            dense, tokenizer, folder, overwrite=overwrite, card=model_card(plan, model),
            finish=partial(verify, dense, trust_remote_code=trust_remote_code),
        )  # fmt: skip
    processes.wait()
    del dense, view, tensors  # measured from the saved files, so that only what was saved counts
    if wanted is None:
        return None
    report = measure_saved(str(folder), model, model if plan.stored.steps else None, wanted, **where)
    if processes.first():
        report.write(folder)
        replace_text(folder / "README.md", model_card(plan, model, report.markdown()))
    return report


def calibration_device(device: str, offload: bool) -> tuple[torch.device | None, str]:
    """Where to calibrate, if that is not where the model is; and where it is loaded, saved, compared and measured.

    Raises:
        DeviceError: no such device, or nothing to bring layers to.
    """
    if not offload:
        return None, device
    place = pick_device(device)
    if str(place) == "cpu":
        raise DeviceError("--offload brings layers from the host to a GPU, and --device is cpu here: leave it out.")
    return place, "cpu"
