"""Many recipes at many budgets, each made, saved, loaded again and measured; what no other beats is the front.

A sweep lies in a folder: sweep.jsonl, whose first line says what is measured and how, and each other line one point;
from it come sweep.json and sweep.html. It goes on where it was: a point that is in the file is not measured again.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import sandcat
from sandcat import hub
from sandcat.architectures import ModelView
from sandcat.data import Text, load_text
from sandcat.defaults import BUDGETS, CALIBRATION_TOKENS, EVALUATION_TEXT, EVALUATION_TOKENS, SWEPT
from sandcat.errors import BadRecipe, BudgetError, CheckpointError, ParityError
from sandcat.machine import machine
from sandcat.measure import load_texts, measure_saved
from sandcat.method import Method
from sandcat.pages import render
from sandcat.plan import RECIPES, check, parse_recipe, record
from sandcat.progress import say
from sandcat.saving import replace_text, save
from sandcat.sparsifying import asked, sparsify
from sandcat.target import Target

FORMAT_VERSION = 1
LINES = "sweep.jsonl"


@dataclass(frozen=True)
class Figures:
    """What was measured of one point, beside the dense model in the same process. Errors are standard errors."""

    ratio: float
    """Sparse perplexity over dense."""
    ratio_error: float
    kl: float
    """Nats a token."""
    kl_error: float
    agreement: float
    bytes: float
    """Bytes that a decode step reads, dense = 1."""
    gain: float
    """Dense time of a decode step over sparse time."""
    milliseconds: float
    """Of the sparse decode step."""
    kernel: str


DENSE = Figures(1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, "")
"""What every point is compared with; its milliseconds are not one number, as they are measured at each point."""


@dataclass(frozen=True)
class Point:
    """One recipe at one budget."""

    recipe: str
    target: str | None
    """None where the recipe's own sparsity holds, or nothing has one."""
    command: str
    """Makes this model again, and its report."""
    seconds: float
    """That making and measuring took."""
    figures: Figures | None = None
    error: str | None = None
    """Why there are no figures: a budget that this recipe cannot meet, say."""


@dataclass(frozen=True)
class Sweep:
    """All points so far, the settings that all of them share, and the machine."""

    settings: dict[str, Any]
    machine: dict[str, str]
    points: list[Point] = field(default_factory=list)

    def front(self, gain: str) -> list[Point]:
        """The points that no other, and not the dense model, equals or beats in both perplexity and `gain`.

        Args:
            gain: "bytes" (the fewer the better) or "gain" (the larger the better).
        """

        def costs(figures: Figures) -> tuple[float, float]:
            return figures.ratio, figures.bytes if gain == "bytes" else -figures.gain

        def beaten(point: Point, figures: Figures) -> bool:
            mine = costs(figures)
            others = [other.figures for other in self.points if other is not point and other.figures is not None]
            return any(a[0] <= mine[0] and a[1] <= mine[1] for a in map(costs, [*others, DENSE]))

        return [point for point in self.points if point.figures is not None and not beaten(point, point.figures)]

    def to_json(self) -> dict[str, Any]:
        fronts = {name: self.front(name) for name in ("bytes", "gain")}
        points = [
            {**asdict(point), "front": [name for name, front in fronts.items() if point in front]}
            for point in self.points
        ]
        return {"format_version": FORMAT_VERSION, "settings": self.settings, "machine": self.machine, "points": points}

    def html(self) -> str:
        """One page that needs no other file and no network."""
        return render("sweep.html.jinja", sweep=self, data=self.to_json())

    def write(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder cannot be written, or the disk is full.
        """
        head = {"format_version": FORMAT_VERSION, "settings": self.settings, "machine": self.machine}
        lines = [json.dumps(row) for row in (head, *map(asdict, self.points))]
        texts = {LINES: "\n".join(lines), "sweep.json": json.dumps(self.to_json(), indent=1), "sweep.html": self.html()}
        for name, text in texts.items():
            replace_text(folder / name, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """
        Raises:
            CheckpointError: no sweep, a damaged one, or one that a newer version wrote.
        """
        path = folder / LINES
        try:
            head, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if head["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{str(path)!r} has format version {head['format_version']}: pip install -U sandcat."
                )
            figures = [None if row["figures"] is None else record(Figures, row["figures"]) for row in rows]
            points = [record(Point, {**row, "figures": found}) for row, found in zip(rows, figures, strict=True)]
            return cls(head["settings"], head["machine"], points)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{str(path)!r} is no sweep, or damaged: {type(error).__name__} {error}.") from error


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
        model: a folder, a hub id, or `hub.EMBEDDED`.
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
        "device": str(hub.pick_device(device)),
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    timing = {"context": context, "runs": runs, "compile": compile}
    settings = {
        "sandcat": sandcat.__version__, "model": name, "allocate": allocate, "calibration": calibration,
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
    dense, tokenizer = hub.load(name, **where)
    for _, target, methods in tries:
        check(methods, ModelView(dense), overlap=target is not None and allocate in (None, "search"))
    words = load_text(calibration, dense, tokenizer, tokens=calibration_tokens, seed=seed)
    texts = load_texts([text], dense, tokenizer, tokens=tokens, seed=seed, calibration=words)
    del dense
    for number, (recipe, target, _) in enumerate(missing, 1):
        say(f"{number} of {len(missing)}: {' '.join(filter(None, (recipe, target)))}")
        start = time.perf_counter()
        try:
            made = _made(name, recipe, target, allocate, words, folder / ".model", where)
            figures, error = _measured(made, name, texts, timing, seed, where), None
        except (BudgetError, ParityError) as failure:
            figures, error = None, str(failure)
        finally:
            shutil.rmtree(folder / ".model", ignore_errors=True)
        command = _command(recipe, target, settings)
        point = Point(recipe, target, command, round(time.perf_counter() - start, 1), figures, error)
        found = replace(found, points=[*found.points, point])
        found.write(folder)
    return found


def expand(
    recipes: Sequence[str], budgets: Sequence[str], allocate: str | None
) -> list[tuple[str, str | None, list[Method]]]:
    """Every recipe with every target that applies to it, and its methods.

    Raises:
        BadRecipe: a recipe, a target or a way of spreading it that does not exist, or nothing to sweep.
    """
    targets = [str(Target.parse(budget)) for budget in budgets]
    found: dict[tuple[str, str | None], list[Method]] = {}
    for recipe in recipes:
        methods = parse_recipe(recipe)
        spread = [method for method in methods if method.has_sparsity]
        own = [method for method in spread if method != method.at(type(method)().options()["sparsity"])]
        if targets and spread and not own:
            for target in targets:
                asked(recipe, target, allocate)
                found[recipe, target] = methods
        elif any(word in RECIPES for word in recipe.split()):
            raise BadRecipe(f"{recipe!r} has no sparsity of its own: give budgets, such as bytes=0.8.")
        else:
            found[recipe, None] = methods
    if not found:
        raise BadRecipe("there is nothing to sweep: give at least one recipe.")
    return [(recipe, target, methods) for (recipe, target), methods in found.items()]


def _made(
    model: str, recipe: str, target: str | None, allocate: str | None, words: Text, folder: Path, where: dict[str, Any]
) -> Path:
    net, tokenizer = hub.load(model, **where)
    sparsify(net, tokenizer, recipe, target=target, allocate=allocate if target else None, calibration=words)
    verify = partial(hub.verify, net, trust_remote_code=where["trust_remote_code"])
    return save(net, tokenizer, folder, overwrite=True, finish=verify)


def _measured(
    folder: Path, model: str, texts: list[Text], timing: dict[str, Any], seed: int, where: dict[str, Any]
) -> Figures:
    report = measure_saved(str(folder), model, model, texts=texts, seed=seed, **timing, **where)
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
