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
from sandcat.data import Text, load_text
from sandcat.decoding.generate import generate
from sandcat.defaults import EVALUATION_TEXT
from sandcat.errors import DataError, PlanError
from sandcat.layers.op_module import kernel_modules, kernels_of
from sandcat.layers.packing import pack
from sandcat.layers.sparse_module import Thresholded
from sandcat.measuring.bytes_read import bytes_share
from sandcat.measuring.machine import machine
from sandcat.measuring.quality import WINDOW, TextResult, evaluate_text
from sandcat.measuring.sparsity import Histogram, histograms, layer_sparsity
from sandcat.measuring.speed import SpeedResult, benchmark
from sandcat.measuring.tasks import run_tasks
from sandcat.method import Method
from sandcat.models.view import ModelView
from sandcat.plans.plan import Plan
from sandcat.reports.report import Report
from sandcat.reports.rows import CurvePoint, Sample
from sandcat.reports.wanted import Wanted
from sandcat.support.processes import first


def measure(
    dense: nn.Module, sparse: nn.Module, tokenizer, wanted: Wanted, *, name: str, stored_dense: nn.Module | None = None
) -> Report:
    """A report of pairs.

    Args:
        dense, sparse: the two models.
        name: the model's name in the report.
        stored_dense: as in `speed.benchmark`.

    Raises:
        DataError, ParityError
    """
    plan = planned(sparse)
    wanted = wanted.loaded(dense, tokenizer)
    wanted.check_apart(plan.calibration)
    questions = wanted.questions()
    speeds = _speeds(dense, sparse, tokenizer, wanted, stored_dense) if wanted.speed and first() else []
    results, realised, points = _quality(dense, sparse, plan, wanted)
    options: dict[str, Any] = {"limit": wanted.limit, "seed": wanted.seed}
    tasks = run_tasks(dense, [sparse], tokenizer, questions, **options)[0] if questions else []
    return Report(
        model=_described(sparse, name),
        recipe=plan.recipe,
        plan=plan.summary(),
        calibration=None if plan.calibration is None else dataclasses.asdict(plan.calibration),
        text=results,
        tasks=tasks,
        sparsity=layer_sparsity(plan, realised) if realised else [],
        histograms=_histograms(sparse, wanted),
        speed=speeds,
        curve=points,
        samples=[write(dense, sparse, tokenizer, prompt) for prompt in wanted.prompts],
        kernels={f"sandcat::{op}": text for op, text in kernels_of(sparse).items()},
        machine=machine(sparse.device),
        commands=[wanted.command] if wanted.command else [],
    )


def _described(sparse: nn.Module, name: str) -> dict[str, Any]:
    """A report's facts about the model."""
    return {
        "name": name,
        "family": sparse.config.model_type,
        "parameters": sum(p.numel() for p in sparse.parameters()),
        "dtype": str(sparse.dtype).removeprefix("torch."),
        "layers": len(ModelView(sparse).layers),
    }


def _speeds(
    dense: nn.Module, sparse: nn.Module, tokenizer, wanted: Wanted, stored_dense: nn.Module | None
) -> list[SpeedResult]:
    """Decode steps at each batch, on real text."""
    texts = [text for text in wanted.texts if isinstance(text, Text)]
    sample = texts[0] if texts else load_text(EVALUATION_TEXT, dense, tokenizer, tokens=8192, window=WINDOW)
    flat, found = sample.ids_NL.flatten(), []
    for batch in wanted.batches:
        needed = batch * (wanted.context + wanted.steps)
        if flat.numel() < needed:
            raise DataError(f"a batch of {batch} needs {needed} tokens of text: ask for more.")
        found.append(
            benchmark(
                dense, sparse, flat[:needed].view(batch, -1), steps=wanted.steps, runs=wanted.runs,
                compile=wanted.compile, stored_dense=stored_dense,
            )
        )  # fmt: skip
    return found


def _quality(
    dense: nn.Module, sparse: nn.Module, plan: Plan, wanted: Wanted
) -> tuple[list[TextResult], dict[str, float], list[CurvePoint]]:
    """Each text at each batch; and of the first text, what each site dropped, and the curve."""
    results: list[TextResult] = []
    realised: dict[str, float] = {}
    points: list[CurvePoint] = []
    for text, batch in product(wanted.texts, wanted.batches):
        assert isinstance(text, Text)  # they are loaded
        others = [] if results else _others(dense, sparse, plan, wanted.curve, wanted.curve_text)
        models = [sparse, *(model for _, model in others)]
        (result, realised_here), *curve_results = evaluate_text(dense, models, text, batch=batch)
        results.append(result)
        realised = realised or realised_here
        own = [(plan.steps[0].method, sparse, result, realised_here)] if others else []
        swept = [(*other, *found) for other, found in zip(others, curve_results, strict=True)]
        points += sorted((_point(*row) for row in own + swept), key=lambda point: point.sparsity)
    return results, realised, points


def _histograms(sparse: nn.Module, wanted: Wanted) -> list[Histogram]:
    """Of the first, the middle and the last site, on a little of the first text."""
    sites = [name for name, module in kernel_modules(sparse).items() if isinstance(module, Thresholded)]
    chosen = list(dict.fromkeys([sites[0], sites[len(sites) // 2], sites[-1]] if sites else []))
    texts = [text for text in wanted.texts if isinstance(text, Text)]
    return histograms(sparse, texts[0].ids_NL[:2], chosen) if texts and chosen else []


def measure_saved(
    folder: str,
    name: str,
    twin: str | None,
    wanted: Wanted,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
) -> Report:
    """Measures the model in a folder beside its dense twin, which the same files hold unless their weights are codes.

    Args:
        twin: the dense model to compare with, a folder or a name.

    Raises:
        PlanError: the folder holds a dense model, or weights as codes and no twin is given; and as `load`, `measure`.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    sparse, tokenizer = load(folder, require_plan=True, **where)
    plan = planned(sparse)
    if plan.stored.steps and twin is None:
        raise PlanError(
            f"the weights in {folder!r} are {' and '.join(plan.formats)}, so it does not hold the dense model. Say "
            "which one to compare with: --dense MODEL, the folder or name that it was made from."
        )
    where["dtype"] = sparse.dtype
    dense, _ = load(twin or folder, dense=True, **where)
    stored_dense = load(folder, dense=True, **where)[0] if plan.stored.steps and plan.stored != plan else None
    return measure(dense, sparse, tokenizer, wanted, name=name, stored_dense=stored_dense)


def _others(
    dense: nn.Module, sparse: nn.Module, plan: Plan, methods: Sequence[Method], text: Text | None
) -> list[tuple[Method, nn.Module]]:
    """Each method with a model of its own, which shares all weights with `sparse`."""
    models = []
    sequential = plan.calibration is None or plan.calibration.sequential
    weights = dict(sparse.named_parameters())
    for method in methods:
        other, tensors = calibrate.decide(ModelView(dense), [method], text, sequential=sequential)
        model = copy.deepcopy(dense, {id(parameter): weights[name] for name, parameter in dense.named_parameters()})
        other.place(ModelView(model), tensors)  # anew: what a module is made of may follow from the sparsity
        pack(model)
        models.append((method, model))
    return models


def _point(method: Method, model: nn.Module, result: TextResult, dropped: dict[str, float]) -> CurvePoint:
    share = bytes_share(model, dropped)
    return CurvePoint(str(method), method.options()["sparsity"], result.ratio, result.ratio_error, result.kl, share)


@torch.inference_mode()
def write(dense: nn.Module, sparse: nn.Module, tokenizer, prompt: str, tokens: int = 60) -> Sample:
    """What both models write after a prompt, greedily."""
    return Sample(prompt, *("".join(generate(m, tokenizer, prompt, max_new_tokens=tokens)) for m in (dense, sparse)))
