"""Many recipes at many budgets, each made, saved, loaded again and measured; what no other beats is the front.

A sweep lies in a folder: sweep.jsonl, whose first line says what is measured and how, and each other line one point;
from it come sweep.json and sweep.html. It goes on where it was: a point that is in the file is not measured again.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandcat.checkpoints.load import load
from sandcat.data import load_text
from sandcat.defaults import BUDGETS, CALIBRATION_TOKENS, EVALUATION_TEXT, EVALUATION_TOKENS, SWEPT
from sandcat.errors import BadRecipe, BudgetError, CheckpointError, ParityError
from sandcat.measuring.machine import machine
from sandcat.models.view import ModelView
from sandcat.pipeline import Order, make
from sandcat.plans.recipe import RECIPES, parse_recipe
from sandcat.plans.target import Target
from sandcat.reports.report import Report
from sandcat.reports.wanted import Wanted
from sandcat.support.devices import pick_device
from sandcat.support.progress import say
from sandcat.sweeps.results import LINES, Figures, Point, Sweep
from sandcat.version import __version__


def sweep(
    model: str | Path,
    recipes: Sequence[str] = SWEPT,
    *,
    folder: str | Path,
    budgets: Sequence[str] = BUDGETS,
    allocate: str | None = None,
    calibration: str = "self",
    calibration_tokens: int = CALIBRATION_TOKENS,
    text: str = EVALUATION_TEXT,
    tokens: int = EVALUATION_TOKENS,
    context: int = 128,
    runs: int = 7,
    compile: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Sweep:
    """Makes and measures every recipe at every budget, and keeps each result in `folder` as soon as it is there.

    Args:
        model: a folder, a hub id, or `EMBEDDED`.
        recipes: each as in `sparsify`, its words with spaces between them. One with a sparsity of its own, or with no
            method that has one, is measured once; the others at each budget.
        folder: for the results; if a sweep with the same settings lies there, it goes on.
        budgets: targets as in `sparsify`.
        allocate, calibration, calibration_tokens, seed: as in `sparsify`.
        text, tokens: to measure perplexity on, as in `measure`.
        context, runs, compile: for the decode step that is timed, as in `benchmark`.

    Raises:
        CheckpointError: another sweep lies in the folder. And as `sparsify`, `save` and `measure`, but for budgets that
            cannot be met and kernels that fail their check: those are results.
    """
    tries = expand(recipes, budgets, allocate)
    folder, name = Path(folder), str(model)
    where: dict[str, Any] = {
        "device": str(pick_device(device)),
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    timing: dict[str, Any] = {"context": context, "runs": runs, "compile": compile}
    settings = {
        "sandcat": __version__, "model": name, "allocate": allocate, "calibration": calibration,
        "calibration_tokens": calibration_tokens, "text": text, "tokens": tokens, "seed": seed, **timing, **where,
    }  # fmt: skip
    found = Sweep(settings, machine(where["device"]))
    if (folder / LINES).exists():
        before = Sweep.read(folder)
        other = {k for k in settings if before.settings.get(k) != settings[k]}
        other |= {k for k in found.machine if before.machine.get(k) != found.machine[k]}
        if other:
            raise CheckpointError(
                f"{str(folder)!r} holds a sweep with another {', '.join(sorted(other))}, and figures of both would not "
                "compare. Choose another folder, or the same settings."
            )
        found = before
    done = {(point.recipe, point.target) for point in found.points}
    missing = [one for one in tries if one[:2] not in done]
    say(f"{len(missing)} of {len(tries)} points to measure")
    if not missing:
        found.write(folder)
        return found
    dense, tokenizer = load(name, to_sparsify=True, **where)
    for _, _, order in tries:
        order.check(ModelView(dense))
    words = load_text(calibration, dense, tokenizer, tokens=calibration_tokens, seed=seed)
    wanted = Wanted(texts=[text], tokens=tokens, seed=seed, **timing).loaded(dense, tokenizer)
    wanted.check_apart(words)
    del dense
    for number, (recipe, target, order) in enumerate(missing, 1):
        say(f"{number} of {len(missing)}: {' '.join(filter(None, (recipe, target)))}")
        start = time.perf_counter()
        try:
            order = replace(order, calibration=words)
            report = make(name, order, folder / ".model", wanted=wanted, overwrite=True, **where)
            figures, error = _figures(report), None
        except (BudgetError, ParityError) as failure:
            figures, error = None, str(failure)
        finally:
            shutil.rmtree(folder / ".model", ignore_errors=True)
        command = _command(recipe, target, settings)
        point = Point(recipe, target, command, round(time.perf_counter() - start, 1), figures, error)
        found = replace(found, points=[*found.points, point])
        found.write(folder)
    return found


def expand(recipes: Sequence[str], budgets: Sequence[str], allocate: str | None) -> list[tuple[str, str | None, Order]]:
    """Every recipe with every target that applies to it, and what is to be made.

    Raises:
        BadRecipe: a recipe, a target or a way of spreading it that does not exist, or nothing to sweep.
    """
    targets = [str(Target.parse(budget)) for budget in budgets]
    found: dict[tuple[str, str | None], Order] = {}
    for recipe in recipes:
        spread = [method for method in parse_recipe(recipe) if method.has_sparsity]
        own = [method for method in spread if method != method.at(type(method)().options()["sparsity"])]
        if targets and spread and not own:
            for target in targets:
                found[recipe, target] = Order(recipe=recipe, target=target, allocate=allocate)
        elif any(word in RECIPES for word in recipe.split()):
            raise BadRecipe(f"{recipe!r} has no sparsity of its own: give budgets, such as bytes=0.8.")
        else:
            found[recipe, None] = Order(recipe=recipe)
    if not found:
        raise BadRecipe("there is nothing to sweep: give at least one recipe.")
    return [(recipe, target, order) for (recipe, target), order in found.items()]


def _figures(report: Report | None) -> Figures:
    """
    Raises:
        ParityError: the sparse model writes no numbers.
    """
    assert report is not None  # as it was asked for
    quality, speed = report.text[0], report.speed[0]
    if not math.isfinite(quality.ratio + quality.ratio_error + quality.kl + quality.kl_error):
        raise ParityError("its perplexity is not a number.")
    return Figures(
        quality.ratio, quality.ratio_error, quality.kl, quality.kl_error, quality.agreement,
        speed.sparse_bytes / speed.dense_bytes, speed.gain, 1e3 * speed.sparse_seconds, speed.kernel,
    )  # fmt: skip


def _command(recipe: str, target: str | None, settings: dict[str, Any]) -> str:
    """The command line that makes one point again."""
    words = ["sandcat", "sparsify", settings["model"], *recipe.split()]
    if target is not None:
        kind, _, value = target.partition("=")
        words += [f"--{kind}", value] + (["--allocate", settings["allocate"]] if settings["allocate"] else [])
    defaults = {"calibration": "self", "calibration_tokens": CALIBRATION_TOKENS, "text": EVALUATION_TEXT,
                "tokens": EVALUATION_TOKENS, "seed": 0, "dtype": "auto"}  # fmt: skip
    for name, default in defaults.items():
        if settings[name] != default:
            words += [f"--{name.replace('_', '-')}", str(settings[name])]
    return shlex.join([*words, "-o", "OUT"])
