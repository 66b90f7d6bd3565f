"""Measures a sparse model beside its dense twin and puts the figures into a Report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from sandcat import calibrate
from sandcat.architectures import ModelView
from sandcat.benchmark import SpeedResult, benchmark, read_bytes
from sandcat.data import Text, load_text
from sandcat.errors import DataError
from sandcat.evaluate import WINDOW, evaluate_text, histograms, layer_sparsity
from sandcat.generate import generate
from sandcat.layers.mlp import sparse_mlps
from sandcat.ops import kernel_name
from sandcat.plan import Plan
from sandcat.registration import plan_of
from sandcat.report import CurvePoint, Report, Sample, machine

EVALUATION_TEXT = "python-docs"
EVALUATION_TOKENS = 16_384


def measure(
    dense: nn.Module,
    sparse: nn.Module,
    tokenizer,
    *,
    name: str,
    texts: Sequence[str | Text] = (EVALUATION_TEXT,),
    tokens: int = EVALUATION_TOKENS,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    speed: bool = True,
    batches: Sequence[int] = (1,),
    context: int = 128,
    steps: int = 20,
    runs: int = 7,
    compile: bool = True,
    curve: Sequence[float] = (),
    curve_text: Text | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    command: str | None = None,
) -> Report:
    """A report of pairs; what is not asked for is left out of it.

    Args:
        dense, sparse: the two models, loaded from one folder.
        name: the model's name in the report.
        texts: sources as in `data.load_text`; calibration text must not be among them.
        tokens: of each text.
        tasks, limit: as in `tasks.run_tasks`.
        speed: time decode steps, at each of `batches`, `context`, `steps`, `runs`, `compile` as in `benchmark`.
        curve: other sparsities of the plan's method to measure the quality of, calibrated on `curve_text`.
        prompts: written on by both models.

    Raises:
        DataError, ParityError
    """
    plan = plan_of(sparse)
    loaded = [
        load_text(text, dense, tokenizer, tokens=tokens, window=WINDOW, seed=seed + 1)
        if isinstance(text, str)
        else text
        for text in texts
    ]  # seed + 1: text that the model writes for evaluation is not what it wrote for calibration
    for text in loaded:
        if plan.calibration is not None and text.sha256 == plan.calibration.sha256:
            raise DataError(f"{text.source!r} is the text that the plan was calibrated on: measure on another one.")
    speeds: list[SpeedResult] = []
    if speed:
        sample = loaded[0] if loaded else load_text(EVALUATION_TEXT, dense, tokenizer, tokens=8192, window=WINDOW)
        flat = sample.ids_NL.flatten()
        for batch in batches:
            if flat.numel() < batch * (context + steps):
                raise DataError(f"a batch of {batch} needs {batch * (context + steps)} tokens of text: ask for more.")
            ids_BT = flat[: batch * (context + steps)].view(batch, -1)
            speeds.append(benchmark(dense, sparse, ids_BT, steps=steps, runs=runs, compile=compile))
    results, realised = [], {}
    for text in loaded:
        result, realised_here = evaluate_text(dense, sparse, text)
        results.append(result)
        realised = realised or realised_here
    done = []
    if tasks:
        from sandcat.tasks import run_tasks

        done = run_tasks(dense, sparse, tokenizer, tasks, limit=limit, seed=seed)
    sites = list(sparse_mlps(sparse))
    chosen = list(dict.fromkeys([sites[0], sites[len(sites) // 2], sites[-1]]))
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
        tasks=done,
        sparsity=layer_sparsity(plan, realised) if realised else [],
        histograms=histograms(sparse, loaded[0].ids_NL[:2], chosen) if loaded else [],
        speed=speeds,
        curve=measure_curve(dense, sparse, plan, curve, curve_text, loaded[0]) if curve and loaded else [],
        samples=[write(dense, sparse, tokenizer, prompt) for prompt in prompts],
        kernels={"sandcat::sparse_mlp": kernel_name(sparse.device)},
        machine=machine(sparse.device),
        commands=[command] if command else [],
    )


def measure_curve(
    dense: nn.Module, sparse: nn.Module, plan: Plan, sparsities: Sequence[float], calibration: Text, text: Text
) -> list[CurvePoint]:
    """Quality at other sparsities of the plan's first method: new thresholds for a moment, then the plan's again."""
    method = plan.steps[0].method
    modules = sparse_mlps(sparse)
    before = {name: module.threshold.clone() for name, module in modules.items()}
    points = []
    try:
        for sparsity in sparsities:
            changed = dataclasses.replace(method, sparsity=sparsity)
            _, tensors = calibrate.decide(
                ModelView(dense), [changed], calibration, sequential=plan.calibration.sequential
            )
            for name, found in tensors.items():
                changed.fill(modules[name], found)
            result, realised = evaluate_text(dense, sparse, text)
            mlps = sum(module.weight_bytes() for module in modules.values())
            kept = sum(module.weight_bytes(1 - realised[name]) for name, module in modules.items())
            total = read_bytes(dense)
            points.append(
                CurvePoint(
                    str(changed), sparsity, result.ratio, result.ratio_error, result.kl, (total - mlps + kept) / total
                )
            )
    finally:
        for name, module in modules.items():
            module.threshold.copy_(before[name])
    return points


@torch.inference_mode()
def write(dense: nn.Module, sparse: nn.Module, tokenizer, prompt: str, tokens: int = 60) -> Sample:
    """What both models write after a prompt, greedily."""
    return Sample(prompt, *("".join(generate(m, tokenizer, prompt, max_new_tokens=tokens)) for m in (dense, sparse)))
