"""`sandcat eval` and `sandcat bench`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

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
    wanted = {
        "texts": text, "tokens": tokens, "tasks": listed(tasks), "limit": limit, "speed": False,
        "batches": whole_numbers(batch, "--batch"), "seed": seed,
    }  # fmt: skip
    where = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    _measure(folder, dense, report, as_json, wanted, where)


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
    wanted = {
        "texts": (), "batches": whole_numbers(batch, "--batch"), "context": context, "steps": steps, "runs": runs,
        "compile": compile, "seed": seed,
    }  # fmt: skip
    where = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    _measure(folder, dense, report, as_json, wanted, where)


def _measure(
    folder: str, dense: str | None, report: Path | None, as_json: bool, wanted: dict[str, Any], where: dict[str, Any]
) -> None:
    """Measures, prints, and writes the report where it is wanted."""
    from sandcat.reports.measure import measure_saved
    from sandcat.reports.wanted import Wanted
    from sandcat.support import processes
    from sandcat.support.progress import shown

    with shown(not as_json):
        found = measure_saved(folder, folder, dense, Wanted(command=this_command(), **wanted), **where)
    if report is not None and processes.first():
        found.write(report)
    print_report(found, as_json)


def this_command() -> str:
    """What was typed, to be typed again."""
    return shlex.join(["sandcat", *sys.argv[1:]])
