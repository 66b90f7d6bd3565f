"""What a sparse model costs and gains, in pairs: for the terminal, as Markdown, as report.json and as report.html."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sandcat.errors import CheckpointError
from sandcat.measuring.quality import TextResult
from sandcat.measuring.sparsity import Histogram, LayerSparsity
from sandcat.measuring.speed import SpeedResult
from sandcat.reports import wording
from sandcat.reports.render import render
from sandcat.reports.rows import CurvePoint, Sample
from sandcat.support.write import replace_text

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """Everything that was measured on one sparse model, saved and loaded again. Fields: docs/report-schema.md."""

    model: dict[str, Any]
    recipe: str
    plan: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    text: list[TextResult] = field(default_factory=list)
    tasks: list[Any] = field(default_factory=list)
    """Each a `tasks.TaskResult`."""
    sparsity: list[LayerSparsity] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    speed: list[SpeedResult] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON types only; a figure that is not finite is null."""
        return {"format_version": FORMAT_VERSION, **_finite(asdict(self))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """
        Raises:
            CheckpointError: written by a newer version, or not a report.
        """
        version = data.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"a report with format_version {version!r}: this sandcat reads up to {FORMAT_VERSION}. If a newer one "
                "wrote it: pip install -U sandcat."
            )
        from sandcat.measuring.tasks import TaskResult

        rows = {
            "text": TextResult, "tasks": TaskResult, "sparsity": LayerSparsity, "histograms": Histogram,
            "speed": SpeedResult, "curve": CurvePoint, "samples": Sample,
        }  # fmt: skip
        try:
            values = {f.name: data[f.name] for f in fields(cls)}
            return cls(**values | {name: [_row(kind, row) for row in values[name]] for name, kind in rows.items()})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"not a report of sandcat, or damaged: {type(error).__name__} {error}.") from error

    def write(self, folder: str | Path) -> None:
        """Writes report.json and report.html, each whole or not at all.

        Raises:
            CheckpointError: the folder cannot be written, or the disk is full.
        """
        texts = {"report.json": json.dumps(self.to_json(), indent=1, allow_nan=False), "report.html": self.html()}
        for name, text in texts.items():
            replace_text(Path(folder) / name, text + "\n")

    def pairs(self) -> dict[str, list[wording.Pair]]:
        """The rows of every output, by the title of their table."""
        missing = ("not measured", "not measured", "")
        tables = {wording.text_title(text): wording.text_pairs(text) for text in self.text}
        if not self.text:
            tables["Quality"] = [wording.Pair("Perplexity", *missing)]
        if self.tasks:
            tables["Tasks"] = [wording.task_pair(task) for task in self.tasks]
        for speed in self.speed:
            title = f"Speed after {speed.context} tokens, batch {speed.batch}"
            tables[title] = tables.get(title, []) + wording.speed_pairs(speed)
        if not self.speed:
            tables["Speed"] = [wording.Pair("Time a token", *missing)]
        return tables

    def notes(self) -> list[str]:
        """What must not be overlooked: a model that got slower, a device without a kernel."""
        notes = [
            f"Slower than dense: after {s.context} tokens at batch {s.batch} a step takes {wording.more(s)} more time."
            for s in self.speed
            if s.gain < 1
        ]
        why = wording.NOTHING_SAVED
        without = [f"{op}: {why[kernel]}." for op, kernel in self.kernels.items() if kernel == "reference"]
        if not without and any(speed.kernel == "reference" for speed in self.speed):
            without = [f"{why['reference'][0].upper()}{why['reference'][1:]}."]
        batches = [f"Batch {s.batch}: {why[s.kernel]}." for s in self.speed if s.kernel in ("masked", "dense")]
        return notes + without + batches

    def summary(self) -> str:
        """What it costs and what it gains, in one sentence."""
        if self.text:
            cost = wording.text_cost(self.text[0])
        elif self.tasks:
            pair = wording.task_pair(self.tasks[0])
            cost = f"{pair.label} goes from {pair.dense} to {pair.sparse}"
        else:
            cost = "Quality was not measured"
        return f"{cost}; {wording.speed_gain(self.speed[0]) if self.speed else 'speed was not measured'}."

    def table(self) -> RenderableType:
        """The pairs for a terminal of 80 columns or more."""
        parts: list[RenderableType] = []
        for title, rows in self.pairs().items():
            table = Table(title=Text(title, "bold"), title_justify="left", box=None, pad_edge=False, header_style="dim")
            table.add_column("", overflow="fold", min_width=25)
            for name, width in (("dense", 12), ("sparse", 20), ("change", 16)):
                table.add_column(name, justify="right", overflow="fold", min_width=width)
            for pair in rows:
                table.add_row(*(Text(cell) for cell in pair))
            parts += [table, ""]
        return Group(*parts, *(Text(note, "bold yellow") for note in self.notes()))

    def markdown(self) -> str:
        """The pairs as a Markdown table, and the notes beneath, for a model card."""
        lines = ["| | dense | sparse | change |", "|:--|--:|--:|--:|"]
        for title, rows in self.pairs().items():
            cells = [(f"**{_markdown(title)}**", "", "", ""), *(map(_markdown, pair) for pair in rows)]
            lines += ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([*lines, *(f"\n{_markdown(note)}" for note in self.notes())])

    def html(self) -> str:
        """One page that needs no other file and no network."""
        from sandcat.reports import plots

        return render("report.html.jinja", report=self, plots=plots)


def _row(kind: type, data: dict[str, Any]) -> Any:
    """A row of its dataclass; null stands for a number that was not finite."""
    data = {name.replace("int8_dense", "stored_dense"): value for name, value in data.items()}  # as it was once called
    lost = {f.name for f in fields(kind) if f.type in ("float", float) and data.get(f.name, 0) is None}
    return kind(**{f.name: math.nan if f.name in lost else data[f.name] for f in fields(kind) if f.name in data})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(text: str) -> str:
    """As text that Markdown leaves alone, on one line."""
    return re.sub(r"([\\|`*\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
