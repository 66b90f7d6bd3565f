"""The command line. Options of methods are not defined here: they come from the methods' own fields."""

from __future__ import annotations

import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sandcat.cli.options import (
    Batch,
    Compile,
    Device,
    Dtype,
    Folder,
    Json,
    Limit,
    Model,
    Report_,
    Runs,
    Seed,
    Tasks,
    Texts,
    Tokens,
    Trust,
    Twin,
    listed,
    numbers,
    whole_numbers,
)  # fmt: skip
from sandcat.cli.printing import err, out, print_json, print_plan, print_report, summary
from sandcat.cli.sweeping import sweep
from sandcat.defaults import CALIBRATION_TOKENS, EVALUATION_TEXT, EVALUATION_TOKENS
from sandcat.errors import BadRecipe, SandcatError

app = typer.Typer(
    help="Make a pretrained language model cheaper to run: for each token, read only the weights this context needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from sandcat.machine import versions

        for name, version in versions().items():
            print(f"{name} {version}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions that matter.")
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
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
    from sandcat import hub, processes
    from sandcat.architectures import ModelView
    from sandcat.data import load_text
    from sandcat.errors import DeviceError
    from sandcat.generate import encode
    from sandcat.measure import at_sparsities, load_texts
    from sandcat.plan import check
    from sandcat.progress import shown
    from sandcat.saving import check_free, model_card, replace_text, save
    from sandcat.sparsifying import asked, sparsify
    from sandcat.target import the_one
    from sandcat.tasks import load_tasks

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
        place, device = hub.pick_device(device), "cpu"  # where it is loaded, saved, compared and measured
        if str(place) == "cpu":
            raise DeviceError("--offload brings layers from the host to a GPU, and --device is cpu here: leave it out.")
    with shown(not as_json):
        questions = load_tasks(listed(tasks)) if tasks and measured else {}
        dense, tokenizer = hub.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
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
                finish=partial(hub.verify, dense, trust_remote_code=trust_remote_code),
            )  # fmt: skip
        processes.wait()
        dense = None  # measured from the saved files, so that only what was saved counts
        if not measure:
            print_json(plan.to_json()) if as_json else out.print(f"saved to {output}", soft_wrap=True)
            return
        report = _measure(
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


app.command()(sweep)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to write on; without it, a chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is freer.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that add up to p.")] = 1.0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default if there is one.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the step: slow to start, then faster.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Ignore the plan: run the dense model.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write on from a prompt, or chat."""
    from sandcat import hub
    from sandcat.generate import generate
    from sandcat.progress import shown

    if prompt is None and as_json:
        raise BadRecipe("--json needs a prompt: a chat is for people.")
    with shown(not as_json):
        net, tokenizer = hub.load(model, dense=dense, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "chat": chat, "compile": "default" if compile else "fused",
    }  # fmt: skip

    def say(asked) -> str:
        pieces = []
        for piece in generate(net, tokenizer, asked, **options):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        if not as_json:
            print()
        return "".join(pieces)

    if prompt is not None:
        start = time.perf_counter()
        said = say(prompt)
        if as_json:
            print_json({"prompt": prompt, "text": said, "seconds": time.perf_counter() - start})
        return
    history: list[dict[str, str]] = []
    err.print("An empty line or Ctrl-D ends the chat.", style="dim")
    while asked := _ask():
        history.append({"role": "user", "content": asked})
        history.append({"role": "assistant", "content": say(history)})


@app.command(name="eval")
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
    from sandcat import processes
    from sandcat.progress import shown

    with shown(not as_json):
        found = _measure(
            folder, folder, dense, texts=text, tokens=tokens, tasks=listed(tasks), limit=limit, speed=False,
            batches=whole_numbers(batch, "--batch"), device=device, dtype=dtype, seed=seed,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if report is not None and processes.first():
        found.write(report)
    print_report(found, as_json)


@app.command()
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
    from sandcat import processes
    from sandcat.progress import shown

    with shown(not as_json):
        found = _measure(
            folder, folder, dense, texts=(), batches=whole_numbers(batch, "--batch"), context=context, steps=steps,
            runs=runs, compile=compile, device=device, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if report is not None and processes.first():
        found.write(report)
    print_report(found, as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: vLLM where it is installed.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="SANDCAT_API_KEY", help="Serve only who sends this key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default its folder's name.")] = None,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together; default the model's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer; longer ones are cut.")] = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Serve a model to OpenAI clients: chat, completions, streaming. Other options go to vLLM as they are."""
    from sandcat import hub
    from sandcat.serve import Service, choose, serve

    folder = hub.resolve(model)
    chosen, reason = choose(engine, folder, hub.read_plan(folder) if Path(folder).is_dir() else None)
    err.print(f"engine: {chosen} ({reason})", style="dim", markup=False, soft_wrap=True)
    service = Service(
        folder, name or Path(folder).name, host, port, api_key, max_context, max_new_tokens, device, dtype,
        trust_remote_code, context.args,
    )  # fmt: skip
    serve(service, chosen)


@app.command()
def show(folder: Folder, as_json: Json = False) -> None:
    """The plan of a sparse model, in words."""
    from sandcat import hub
    from sandcat.errors import PlanError

    plan = hub.read_plan(hub.resolve(folder))
    if plan is None:
        raise PlanError(f"{folder!r} is a dense model: no plan in its config.json. Make one with sandcat sparsify.")
    print_json(plan.to_json()) if as_json else print_plan(plan)


@app.command()
def methods(as_json: Json = False) -> None:
    """All methods with their options."""
    from sandcat.methods import METHODS

    if as_json:
        print_json([{"name": m.name, "summary": summary(m), "slot": m.slot, "options": m.describe()} for m in METHODS])
        return
    for method in METHODS:
        table = Table("option", "type", "default", "what it does", box=None, title_justify="left", pad_edge=False)
        table.title = f"[bold]{method.name}[/bold]  {summary(method)}"
        for option in method.describe():
            table.add_row(
                option["name"],
                option["type"].replace("[", "\\["),
                str(option["default"]),
                option["help"].replace("[", "\\["),
            )
        out.print(table, end="\n\n")
    out.print("Give options after a colon: sandcat sparsify MODEL cats:sparsity=0.5,score=output -o OUT", style="dim")


def _measure(*args, **options):
    from sandcat.measure import measure_saved

    return measure_saved(*args, command=shlex.join(["sandcat", *sys.argv[1:]]), **options)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 2 a mistake that the message explains, 130 interrupted."""
    try:
        if "WORLD_SIZE" in os.environ:  # a launcher's; else nothing here needs torch
            from sandcat.processes import together

            with together():
                app()
        else:
            app()
    except SandcatError as error:
        process = os.environ.get("RANK", "0")
        who = "sandcat" if process == "0" else f"sandcat, process {process}"
        err.print(f"{who}: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
