"""`sandcat sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sandcat.cli.measuring import this_command
from sandcat.cli.options import (
    Compile,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    Runs,
    Seed,
    Tasks,
    Texts,
    Tokens,
    Trust,
    listed,
    numbers,
)
from sandcat.cli.printing import out, print_json, print_plan, print_report
from sandcat.defaults import CALIBRATION_TOKENS, EVALUATION_TEXT, EVALUATION_TOKENS
from sandcat.errors import BadRecipe


def sparsify(
    model: Model,
    recipe: Annotated[
        list[str], typer.Argument(help='Methods, as in "cats:sparsity=0.5,score=output"; sandcat is what is best.')
    ] = ["sandcat"],  # noqa: B006
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the sparse model.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Target: the share not read of what the methods change.")
    ] = None,
    bytes: Annotated[float | None, typer.Option(help="Target: the share read of the dense model's weights.")] = None,
    quality: Annotated[
        str | None, typer.Option(help='Target: as few bytes as keep "ppl+1%" on a part of the calibration text.')
    ] = None,
    allocate: Annotated[
        str | None, typer.Option(help="How a target is spread: uniform, equal-error or search (default).")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(help="Text to calibrate on: self (the model writes it), a .txt or .jsonl file, a hub dataset."),
    ] = "self",
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it.")] = CALIBRATION_TOKENS,
    sequential: Annotated[
        bool, typer.Option(help="Calibrate each layer on what the sparse layers before it give.")
    ] = True,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Keep the model on the host, and calibrate on --device one layer at a time."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure the saved model and report.")] = True,
    text: Texts = [EVALUATION_TEXT],  # noqa: B006
    tokens: Tokens = EVALUATION_TOKENS,
    tasks: Tasks = "",
    limit: Limit = None,
    curve: Annotated[str, typer.Option(help="Other sparsities to measure the quality of, by commas.")] = "",
    prompt: Annotated[list[str], typer.Option(help="A prompt that both models write on; may be repeated.")] = [],  # noqa: B006
    runs: Runs = 7,
    compile: Compile = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Make a model sparse, save it, reload it, measure it beside the dense one, and report."""
    from sandcat.checkpoints.load import load, read_plan
    from sandcat.pipeline import Order, calibration_device, make, sparsify
    from sandcat.plans.target import the_one
    from sandcat.reports.wanted import Wanted, at_sparsities
    from sandcat.support.progress import shown

    goal = the_one(sparsity=sparsity, bytes=bytes, quality=quality)
    order = Order(
        recipe=recipe, target=goal, allocate=allocate, calibration=calibration, calibration_tokens=calibration_tokens,
        sequential=sequential, seed=seed,
    )  # fmt: skip
    if order.goal is not None and curve:
        raise BadRecipe(f"--curve sweeps the recipe's own sparsity, and here {order.goal} sets it: leave out one.")
    others = at_sparsities(order.methods, numbers(curve, "--curve"))
    if dry_run:
        with shown(not as_json):
            place, device = calibration_device(device, offload)
            dense, tokenizer = load(
                model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, to_sparsify=True
            )
            plan = sparsify(dense, tokenizer, **vars(order), device=place, dry_run=True)
        print_json(plan.to_json()) if as_json else print_plan(plan)
        return
    if output is None:
        raise BadRecipe("give the folder for the sparse model with -o, or only look at the plan with --dry-run.")
    wanted = Wanted(
        texts=text, tokens=tokens, tasks=listed(tasks), limit=limit, runs=runs, compile=compile, curve=others,
        prompts=prompt, seed=seed, command=this_command(),
    )  # fmt: skip
    with shown(not as_json):
        report = make(
            model, order, output, wanted=wanted if measure else None, offload=offload, overwrite=overwrite,
            device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if report is not None:
        print_report(report, as_json)
    if not as_json:
        rest = f"; the whole report: {output / 'report.html'}" if report else ""
        out.print(f"\nsaved to {output}{rest}", soft_wrap=True)
    elif report is None:
        saved = read_plan(output)
        assert saved is not None
        print_json(saved.to_json())
