"""Measures a sparse model beside its dense twin and puts the figures into a Report."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from sandcat.calibration import calibrate
from sandcat.checkpoints.load import load
from sandcat.checkpoints.quantizer import planned
from sandcat.data import Text, load_text, same_source
from sandcat.decoding.generate import generate
from sandcat.defaults import EVALUATION_TEXT, EVALUATION_TOKENS
from sandcat.errors import BadRecipe, DataError, PlanError
from sandcat.layers.op_module import kernel_modules, kernels_of
from sandcat.layers.sparse_module import Thresholded
from sandcat.measuring.bytes_read import bytes_share
from sandcat.measuring.machine import machine
from sandcat.measuring.quality import WINDOW, TextResult, evaluate_text
from sandcat.measuring.sparsity import histograms, layer_sparsity
from sandcat.measuring.speed import SpeedResult, benchmark
from sandcat.measuring.tasks import load_tasks, run_tasks
from sandcat.method import Method
from sandcat.models.view import ModelView
from sandcat.plans.plan import Calibration, Plan
from sandcat.reports.report import Report
from sandcat.reports.rows import CurvePoint, Sample
from sandcat.support.processes import first


def measure(
    dense: nn.Module,
    sparse: nn.Module,
    tokenizer,
    *,
    name: str,
    int8_dense: nn.Module | None = None,
    texts: Sequence[str | Text] = (EVALUATION_TEXT,),
    tokens: int = EVALUATION_TOKENS,
    tasks: Sequence[str] | dict[str, dict] = (),
    limit: int | None = None,
    speed: bool = True,
    batches: Sequence[int] = (1,),
    context: int = 128,
    steps: int = 20,
    runs: int = 7,
    compile: bool = True,
    curve: Sequence[Method] = (),
    curve_text: Text | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    command: str | None = None,
) -> Report:
    """A report of pairs; what is not asked for is left out of it.

    Args:
        dense, sparse: the two models.
        name: the model's name in the report.
        int8_dense: as in `benchmark`.
        texts: sources as in `data.load_text`; calibration text must not be among them.
        tokens: of each text.
        tasks, limit: names, or what `tasks.load_tasks` gave; as in `tasks.run_tasks`.
        batches: sequences at once: of a decode step that is timed, and of an evaluation as in `evaluate_text`.
        speed: time decode steps, in the first of several processes, at `context`, `steps`, `runs`, `compile` as in
            `benchmark`.
        curve: the plan's method with other options, to measure the quality of, each calibrated on `curve_text`; see
            `at_sparsities`.
        prompts: written on by both models.

    Raises:
        DataError, ParityError
    """
    plan = planned(sparse)
    loaded = load_texts(texts, dense, tokenizer, tokens=tokens, seed=seed, calibration=plan.calibration)
    questions = tasks if isinstance(tasks, dict) else load_tasks(tasks) if tasks else {}
    speeds: list[SpeedResult] = []
    if speed and first():
        sample = loaded[0] if loaded else load_text(EVALUATION_TEXT, dense, tokenizer, tokens=8192, window=WINDOW)
        flat = sample.ids_NL.flatten()
        for batch in batches:
            if flat.numel() < batch * (context + steps):
                raise DataError(f"a batch of {batch} needs {batch * (context + steps)} tokens of text: ask for more.")
            ids_BT = flat[: batch * (context + steps)].view(batch, -1)
            speeds.append(
                benchmark(dense, sparse, ids_BT, steps=steps, runs=runs, compile=compile, int8_dense=int8_dense)
            )
    results: list[TextResult] = []
    realised: dict[str, float] = {}
    points: list[CurvePoint] = []
    for text, batch in product(loaded, batches):
        others = [] if results else _others(dense, sparse, plan, curve, curve_text)
        models = [sparse, *(model for _, model in others)]
        (result, realised_here), *curve_results = evaluate_text(dense, models, text, batch=batch)
        results.append(result)
        realised = realised or realised_here
        own = [(plan.steps[0].method, sparse, result, realised_here)] if others else []
        swept = [(*other, *found) for other, found in zip(others, curve_results, strict=True)]
        points += sorted((_point(*row) for row in own + swept), key=lambda point: point.sparsity)
    modules = kernel_modules(sparse)
    sites = [name for name, module in modules.items() if isinstance(module, Thresholded)]
    chosen = list(dict.fromkeys([sites[0], sites[len(sites) // 2], sites[-1]] if sites else []))
    return Report(
        model={
            "name": name,
            "family": sparse.config.model_type,
            "parameters": sum(p.numel() for p in sparse.parameters()),
            "dtype": str(sparse.dtype).removeprefix("torch."),
            "layers": len(ModelView(sparse).layers),
        },
        recipe=plan.recipe,
        plan=plan.summary(),
        calibration=None if plan.calibration is None else dataclasses.asdict(plan.calibration),
        text=results,
        tasks=run_tasks(dense, [sparse], tokenizer, questions, limit=limit, seed=seed)[0] if questions else [],
        sparsity=layer_sparsity(plan, realised) if realised else [],
        histograms=histograms(sparse, loaded[0].ids_NL[:2], chosen) if loaded and chosen else [],
        speed=speeds,
        curve=points,
        samples=[write(dense, sparse, tokenizer, prompt) for prompt in prompts],
        kernels={f"sandcat::{op}": text for op, text in kernels_of(sparse).items()},
        machine=machine(sparse.device),
        commands=[command] if command else [],
    )


def measure_saved(
    folder: str,
    name: str,
    twin: str | None,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    **options: Any,
) -> Report:
    """Measures the model in a folder beside its dense twin, which the same files hold unless their weights are int8.

    Args:
        twin: the dense model to compare with, a folder or a name.
        options: of `measure`.

    Raises:
        PlanError: the folder holds a dense model, or int8 weights and no twin is given; and as `load`, `measure`.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    sparse, tokenizer = load(folder, require_plan=True, **where)
    plan = planned(sparse)
    if plan.stored.steps and twin is None:
        raise PlanError(
            f"the weights in {folder!r} are int8, so it does not hold the dense model. Say which one to compare with: "
            "--dense MODEL, the folder or name that it was made from."
        )
    where["dtype"] = sparse.dtype
    dense, _ = load(twin or folder, dense=True, **where)
    int8_dense = load(folder, dense=True, **where)[0] if plan.stored.steps and plan.stored != plan else None
    return measure(dense, sparse, tokenizer, name=name, int8_dense=int8_dense, **options)


def load_texts(
    texts: Sequence[str | Text],
    model: nn.Module,
    tokenizer,
    *,
    tokens: int,
    seed: int,
    calibration: Calibration | Text | None,
) -> list[Text]:
    """Texts to measure on, from their sources.

    Raises:
        DataError: as `data.load_text`; or one of them is the calibration text.
    """
    loaded = []
    for text in texts:
        if isinstance(text, str):  # what the model writes to be measured on is not what it wrote for calibration
            text = load_text(text, model, tokenizer, tokens=tokens, window=WINDOW, seed=seed + 1)
        if calibration is not None and same_source(text.source, calibration.source):
            raise DataError(f"{text.source!r} is the text that the plan was calibrated on: measure on another one.")
        loaded.append(text)
    return loaded


def at_sparsities(methods: Sequence[Method], sparsities: Sequence[float]) -> list[Method]:
    """The recipe's only method at other sparsities, for `measure(curve=...)`.

    Raises:
        BadRecipe: several methods, one without the option `sparsity`, or a sparsity outside its range.
    """
    if sparsities and (len(methods) != 1 or "sparsity" not in methods[0].options()):
        raise BadRecipe(
            f"--curve needs a recipe of one method with the option sparsity, not {' '.join(map(str, methods))}."
        )
    return [methods[0].at(sparsity) for sparsity in sparsities]


def _others(
    dense: nn.Module, sparse: nn.Module, plan: Plan, methods: Sequence[Method], text: Text | None
) -> list[tuple[Method, nn.Module]]:
    """Each method with a model of its own, which shares all weights with `sparse`."""
    models = []
    sequential = plan.calibration is None or plan.calibration.sequential
    for method in methods:
        _, tensors = calibrate.decide(ModelView(dense), [method], text, sequential=sequential)
        model = copy.deepcopy(sparse, {id(parameter): parameter for parameter in sparse.parameters()})
        for (_, name), found in tensors.items():
            method.fill(model.get_submodule(name), found)
        models.append((method, model))
    return models


def _point(method: Method, model: nn.Module, result: TextResult, dropped: dict[str, float]) -> CurvePoint:
    share = bytes_share(model, dropped)
    return CurvePoint(str(method), method.options()["sparsity"], result.ratio, result.ratio_error, result.kl, share)


@torch.inference_mode()
def write(dense: nn.Module, sparse: nn.Module, tokenizer, prompt: str, tokens: int = 60) -> Sample:
    """What both models write after a prompt, greedily."""
    return Sample(prompt, *("".join(generate(m, tokenizer, prompt, max_new_tokens=tokens)) for m in (dense, sparse)))
