"""The command line. Options of methods are not defined here: they come from the methods' own fields."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from sandcat.cli.generating import generate
from sandcat.cli.measuring import bench, evaluate
from sandcat.cli.printing import err
from sandcat.cli.serving import serve
from sandcat.cli.showing import methods, show
from sandcat.cli.sparsifying import sparsify
from sandcat.cli.sweeping import sweep
from sandcat.errors import SandcatError

app = typer.Typer(
    help="Make a pretrained language model cheaper to run: for each token, read only the weights this context needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from sandcat.measuring.machine import versions

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


app.command()(sparsify)
app.command()(sweep)
app.command()(generate)
app.command(name="eval")(evaluate)
app.command()(bench)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(show)
app.command()(methods)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 2 a mistake that the message explains, 130 interrupted."""
    try:
        if "WORLD_SIZE" in os.environ:  # a launcher's; else nothing here needs torch
            from sandcat.support.processes import together

            with together():
                app()
        else:
            app()
    except SandcatError as error:
        process = os.environ.get("RANK", "0")
        who = "sandcat" if process == "0" else f"sandcat, process {process}"
        err.print(f"{who}: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
