"""`sandcat sparsify`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sandcat.cli.measuring import measured_saved
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
    from sandcat.checkpoints.card import model_card
    from sandcat.checkpoints.load import load, verify
    from sandcat.checkpoints.save import save
    from sandcat.data import load_text
    from sandcat.decoding.generate import encode
    from sandcat.errors import DeviceError
    from sandcat.measuring.tasks import load_tasks
    from sandcat.models.view import ModelView
    from sandcat.pipeline import asked, sparsify
    from sandcat.plans.recipe import check
    from sandcat.plans.target import the_one
    from sandcat.reports.measure import at_sparsities, load_texts
    from sandcat.support import processes
    from sandcat.support.devices import pick_device
    from sandcat.support.progress import shown
    from sandcat.support.whole_folder import check_free
    from sandcat.support.write import replace_text

    methods, goal, how = asked(recipe, the_one(sparsity=sparsity, bytes=bytes, quality=quality), allocate)
    if goal is not None and curve:
        raise BadRecipe(f"--curve sweeps the recipe's own sparsity, and here the target {goal} sets it: leave out one.")
    others = at_sparsities(methods, numbers(curve, "--curve"))
    if not dry_run and output is None:
        raise BadRecipe("give the folder for the sparse model with -o, or only look at the plan with --dry-run.")
    if output is not None and not dry_run:
        check_free(output, overwrite)
    measured = measure and not dry_run
    place = None
    if offload:
        place, device = pick_device(device), "cpu"  # where it is loaded, saved, compared and measured
        if str(place) == "cpu":
            raise DeviceError("--offload brings layers from the host to a GPU, and --device is cpu here: leave it out.")
    with shown(not as_json):
        questions = load_tasks(listed(tasks)) if tasks and measured else {}
        dense, tokenizer = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        check(methods, ModelView(dense), overlap=how == "search")
        for line in prompt if measured else []:
            encode(tokenizer, line)
        texts = load_texts(text, dense, tokenizer, tokens=tokens, seed=seed, calibration=None) if measured else []
        words = None
        if goal is not None or any(method.calibrated for method in methods):
            words = load_text(calibration, dense, tokenizer, tokens=calibration_tokens, seed=seed)
            load_texts(texts, dense, tokenizer, tokens=tokens, seed=seed, calibration=words)
        plan = sparsify(
            dense, tokenizer, methods, target=goal, allocate=how, calibration=words or "self", sequential=sequential,
            device=place, dry_run=dry_run,
        )  # fmt: skip
        if dry_run:
            print_json(plan.to_json()) if as_json else print_plan(plan)
            return
        assert output is not None  # see above
        if processes.first():
            save(
                dense, tokenizer, output, overwrite=overwrite, card=model_card(plan, model),
                finish=partial(verify, dense, trust_remote_code=trust_remote_code),
            )  # fmt: skip
        processes.wait()
        dense = None  # measured from the saved files, so that only what was saved counts
        if not measure:
            print_json(plan.to_json()) if as_json else out.print(f"saved to {output}", soft_wrap=True)
            return
        report = measured_saved(
            str(output), model, model if plan.stored.steps else None, texts=texts, tokens=tokens, tasks=questions,
            limit=limit, curve=others, curve_text=words, prompts=prompt, runs=runs, compile=compile, device=device,
            dtype=dtype, seed=seed, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if processes.first():
        report.write(output)
        replace_text(output / "README.md", model_card(plan, model, report.markdown()))
    print_report(report, as_json)
    if not as_json:
        out.print(f"\nsaved to {output}; the whole report: {output / 'report.html'}", soft_wrap=True)
