"""`sandcat sweep`: recipes times budgets, and the front of what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sandcat.cli.options import Compile, Device, Dtype, Json, Model, Runs, Seed, Tokens, Trust, listed
from sandcat.cli.printing import out, print_json
from sandcat.defaults import BUDGETS, CALIBRATION_TOKENS, EVALUATION_TEXT, EVALUATION_TOKENS, SWEPT

if TYPE_CHECKING:
    from sandcat.sweeps.results import Sweep


def sweep(
    model: Model,
    recipe: Annotated[
        list[str], typer.Argument(help='Recipes, each in quotes if it has several methods, as in "int8 teal".')
    ] = list(SWEPT),  # noqa: B006
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the results; one that is there goes on.")
    ] = Path("sweep"),
    bytes: Annotated[str, typer.Option(help="Budgets: shares read of the dense model's weights, by commas.")] = "",
    sparsity: Annotated[str, typer.Option(help="Budgets: shares not read of what the methods change.")] = "",
    quality: Annotated[str, typer.Option(help='Budgets: losses of quality, as in "ppl+1%,ppl+5%".')] = "",
    allocate: Annotated[
        str | None, typer.Option(help="How a budget is spread: uniform, equal-error or search (default).")
    ] = None,
    calibration: Annotated[str, typer.Option(help="Text to calibrate on: as in sparsify.")] = "self",
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it.")] = CALIBRATION_TOKENS,
    text: Annotated[str, typer.Option(help="Text to measure perplexity on.")] = EVALUATION_TEXT,
    tokens: Tokens = EVALUATION_TOKENS,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache of the step that is timed.")] = 128,
    runs: Runs = 7,
    compile: Compile = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Try recipes at budgets, and show which are worth having: the front of quality against bytes and speed."""
    from sandcat.support.progress import shown
    from sandcat.sweeps.sweep import sweep

    given = {"bytes": bytes, "sparsity": sparsity, "quality": quality}
    budgets = [f"{kind}={value}" for kind, values in given.items() for value in listed(values)]
    with shown(not as_json):
        found = sweep(
            model, recipe, folder=output, budgets=budgets or BUDGETS, allocate=allocate, calibration=calibration,
            calibration_tokens=calibration_tokens, text=text, tokens=tokens, context=context, runs=runs,
            compile=compile, device=device, dtype=dtype, seed=seed, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if as_json:
        print_json(found.to_json())
        return
    out.print(table(found))
    out.print(f"\n* on the front. All of it, to look at: {output / 'sweep.html'}", soft_wrap=True)


def table(found: Sweep) -> Table:
    """A row for each point, the best quality first; a star where nothing else is as good."""
    rows = Table("recipe", "budget", box=None, pad_edge=False, header_style="dim")
    for name in ("perplexity", "bytes", "speed"):
        rows.add_column(name, justify="right")
    by_bytes, by_gain = found.front("bytes"), found.front("gain")
    for point in sorted(found.points, key=lambda point: point.figures.ratio if point.figures else float("inf")):
        figures = point.figures
        cells = ["", "", point.error.partition(".")[0]] if point.error else []
        if figures is not None:
            cells = [
                f"x{figures.ratio:.4f} ± {figures.ratio_error:.4f}",
                f"{figures.bytes:.3f}{'*' if point in by_bytes else ' '}",
                f"{figures.gain:.2f}x{'*' if point in by_gain else ' '}",
            ]
        rows.add_row(point.recipe, point.target or "", *cells)
    return rows
