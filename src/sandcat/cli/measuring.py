"""`sandcat eval` and `sandcat bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sandcat.cli.options import (
    Batch,
    Compile,
    Device,
    Dtype,
    Folder,
    Json,
    Limit,
    Report_,
    Runs,
    Seed,
    Tasks,
    Texts,
    Tokens,
    Trust,
    Twin,
    listed,
    whole_numbers,
)
from sandcat.cli.printing import print_report
from sandcat.defaults import EVALUATION_TEXT, EVALUATION_TOKENS


def evaluate(
    folder: Folder,
    text: Texts = [EVALUATION_TEXT],  # noqa: B006
    tokens: Tokens = EVALUATION_TOKENS,
    tasks: Tasks = "",
    limit: Limit = None,
    batch: Batch = "1",
    dense: Twin = None,
    report: Report_ = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quality beside the dense model: perplexity, KL, agreement, tasks, realised sparsity."""
    _measure(
        folder, dense, report, as_json, texts=text, tokens=tokens, tasks=listed(tasks), limit=limit, speed=False,
        batches=whole_numbers(batch, "--batch"), device=device, dtype=dtype, seed=seed,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def bench(
    folder: Folder,
    batch: Batch = "1",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="Steps a run.")] = 20,
    runs: Runs = 7,
    compile: Compile = True,
    dense: Twin = None,
    report: Report_ = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Speed beside the dense model: time and bytes of a decode step, interleaved, on real text."""
    _measure(
        folder, dense, report, as_json, texts=(), batches=whole_numbers(batch, "--batch"), context=context, steps=steps,
        runs=runs, compile=compile, device=device, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _measure(folder: str, dense: str | None, report: Path | None, as_json: bool, **options) -> None:
    """Measures, prints, and writes the report where it is wanted."""
    from sandcat.support import processes
    from sandcat.support.progress import shown

    with shown(not as_json):
        found = measured_saved(folder, folder, dense, **options)
    if report is not None and processes.first():
        found.write(report)
    print_report(found, as_json)


def measured_saved(*args, **options):
    """`sandcat.reports.measure.measure_saved`, which is told the command that it prints again."""
    from sandcat.reports.measure import measure_saved

    return measure_saved(*args, command=shlex.join(["sandcat", *sys.argv[1:]]), **options)
