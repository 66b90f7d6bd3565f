"""Options that several commands share, and what their texts stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sandcat.errors import BadRecipe

Model = Annotated[str, typer.Argument(help="Folder, hub id, or smollm2-135m (embedded, needs no network).")]
Folder = Annotated[str, typer.Argument(help="A folder that sandcat sparsify wrote.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto keeps the checkpoint's.")]
Seed = Annotated[int, typer.Option(help="For everything that is drawn at random.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]
Texts = Annotated[
    list[str],
    typer.Option("--text", help="Text to measure on: a .txt or .jsonl file, a hub dataset, python-docs, self."),
]
Tokens = Annotated[int, typer.Option(help="Tokens of each text.")]
Tasks = Annotated[str, typer.Option(help="lm-eval tasks, or local files, by commas; paper for the CATS paper's eight.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many examples of each task.")]
Batch = Annotated[str, typer.Option(help="Sequences at once, in decode steps, by commas.")]
Runs = Annotated[int, typer.Option(min=1, help="Interleaved timing runs; the median counts.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Time steps under torch.compile too.")]
Twin = Annotated[
    str | None,
    typer.Option(
        "--dense", help="The dense model to compare with; default the one in the folder, if its files hold it."
    ),
]
Report_ = Annotated[Path | None, typer.Option("--report", help="Folder to write report.json and report.html to.")]


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, name: str) -> list[float]:
    """Those in a text with commas between them; BadRecipe says of which option they are not."""
    try:
        return [float(part) for part in listed(text)]
    except ValueError:
        raise BadRecipe(f"{name} {text!r}: give numbers with commas between them.") from None


def whole_numbers(text: str, name: str) -> list[int]:
    """The same of whole ones from 1 on."""
    found = numbers(text, name)
    if not found or any(number < 1 or number != int(number) for number in found):
        raise BadRecipe(f"{name} {text!r}: give whole numbers from 1 on, with commas between them.")
    return [int(number) for number in found]
