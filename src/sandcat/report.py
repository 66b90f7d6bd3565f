"""What a sparse model costs and gains: dense and sparse in pairs, for the terminal, as report.json and as report.html."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from sandcat.architectures import ModelView
from sandcat.benchmark import SpeedResult
from sandcat.errors import CheckpointError
from sandcat.evaluate import Histogram, LayerSparsity, TextResult
from sandcat.plan import Plan

FORMAT_VERSION = 1
REFERENCE_NOTE = "no kernel for this device: the reference ran, nothing is saved"


@dataclass(frozen=True)
class CurvePoint:
    """One recipe of a sweep over sparsity."""

    recipe: str
    sparsity: float
    """Share of neurons dropped on the evaluation text."""
    perplexity_ratio: float
    """Sparse perplexity over dense, with its standard error."""
    ratio_error: float
    kl: float
    """Nats a token."""
    bytes_ratio: float | None
    """Bytes that a sparse step reads over those of a dense one; None if not counted."""


@dataclass(frozen=True)
class Sample:
    """What both models write after one prompt."""

    prompt: str
    dense: str
    sparse: str


class Pair(NamedTuple):
    """One row, ready to print; an empty text where there is nothing to say."""

    label: str
    dense: str
    sparse: str
    change: str


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
                f"a report with format_version {version!r}: this sandcat reads up to {FORMAT_VERSION}. If a newer one wrote "
                "it: pip install -U sandcat."
            )
        from sandcat.tasks import TaskResult

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
            path = Path(folder) / name
            part = path.with_name(f".{name}.{os.getpid()}.part")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_text(text + "\n", encoding="utf-8")
                os.replace(part, path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise CheckpointError(f"{str(path)!r} was not written: {error.strerror or error}.") from error

    def pairs(self) -> dict[str, list[Pair]]:
        """The rows of every output, by the title of their table."""
        quality = [pair for text in self.text for pair in _text_pairs(text)]
        tables = {"Quality": quality + [_task_pair(task) for task in self.tasks]}
        if not self.text:
            tables["Quality"].insert(0, Pair("Perplexity", "not measured", "not measured", ""))
        for speed in self.speed:
            title = f"Speed after {speed.context} tokens, batch {speed.batch}"
            tables[title] = tables.get(title, []) + _speed_pairs(speed)
        if not self.speed:
            tables["Speed"] = [Pair("Time a token", "not measured", "not measured", "")]
        return tables

    def notes(self) -> list[str]:
        """What must not be overlooked: a model that got slower, a device without a kernel."""
        notes = [
            f"Slower than dense: after {s.context} tokens at batch {s.batch} a step takes {_more(s)} more time."
            for s in self.speed
            if s.gain < 1
        ]
        without = [f"{op}: {REFERENCE_NOTE}." for op, kernel in self.kernels.items() if kernel == "reference"]
        if not without and any(speed.kernel == "reference" for speed in self.speed):
            without = [f"{REFERENCE_NOTE[0].upper()}{REFERENCE_NOTE[1:]}."]
        return notes + without

    def summary(self) -> str:
        """What it costs and what it gains, in one sentence."""
        if self.text:
            text = self.text[0]
            percent = f"{100 * abs(text.ratio - 1):.1f}{_error(100 * text.ratio_error, '.1f')} %"
            cost = f"Perplexity on {text.source} {'rises' if text.ratio >= 1 else 'falls'} by {percent}"
        elif self.tasks:
            pair = _task_pair(self.tasks[0])
            cost = f"{pair.label} goes from {pair.dense} to {pair.sparse}"
        else:
            cost = "Quality was not measured"
        if not self.speed:
            return f"{cost}; speed was not measured."
        s = self.speed[0]
        times = f"{_unit(s)} takes {milliseconds(s.sparse_seconds)} instead of {milliseconds(s.dense_seconds)}"
        allowed = f"the bytes {'would allow' if s.gain < 1 or s.kernel == 'reference' else 'allow'} {s.allowed_gain:.2f}x"
        gain = f"slower than dense by {_more(s)}" if s.gain < 1 else f"{s.gain:.2f}x as fast"
        end = f"; {REFERENCE_NOTE}" if s.kernel == "reference" else ""
        return f"{cost}; {times}: {gain}, where {allowed}{end}."

    def table(self) -> RenderableType:
        """The pairs for a terminal of 80 columns or more."""
        parts: list[RenderableType] = []
        for title, rows in self.pairs().items():
            table = Table(title=Text(title, "bold"), title_justify="left", box=None, pad_edge=False, header_style="dim")
            table.add_column("", overflow="fold", ratio=5)
            for name, ratio in (("dense", 3), ("sparse", 4), ("change", 4)):
                table.add_column(name, justify="right", overflow="fold", ratio=ratio)
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
        import jinja2

        from sandcat import plots

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters |= {"ms": milliseconds, "size": size, "share": share, "figure": figure}
        template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
        return template.render(report=self, plots=plots)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """`Report.plan`: the plan without what it decided for each site."""
    data = plan.to_json()
    return data | {"methods": [{"name": m["name"], "options": m["options"]} for m in data["methods"]]}


def model_facts(model: nn.Module, name: str) -> dict[str, Any]:
    """`Report.model`: name, family, parameters (a tied one counts once), dtype, decoder layers."""
    return {
        "name": name,
        "family": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(ModelView(model).layers),
    }


def machine(device: torch.device | str) -> dict[str, str]:
    """What the figures were measured on: processor, threads, GPU, and the versions that matter."""
    device = torch.device(device)
    facts = {"cpu": _cpu(), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    facts |= {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    facts["torch"] = torch.__version__
    for package in ("transformers", "sandcat", "triton" if device.type == "cuda" else "numba"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    return facts


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def figure(value: float | None, digits: int = 4) -> str:
    """A number in so many significant digits; "not a number" where it is none."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".") if value else "0"


def share(value: float | None, error: float = 0.0) -> str:
    """A fraction in per cent."""
    finite = value is not None and math.isfinite(value)
    return f"{100 * value:.1f}{_error(100 * (error or 0), '.1f')} %" if finite else "not a number"


def milliseconds(seconds: float) -> str:
    return f"{figure(1e3 * seconds, 3)} ms"


def size(count: float) -> str:
    """Bytes in decimal units."""
    power = min(4, max(0, int(math.log10(count)) // 3)) if count >= 1 else 0
    return f"{figure(count / 1000**power, 4) if power else int(count)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _error(error: float | None, form: str) -> str:
    """A standard error to append; nothing where it is unknown."""
    return f" ± {error:{form}}" if error and math.isfinite(error) else ""


def _text_pairs(text: TextResult) -> list[Pair]:
    change = f"{figure(text.ratio)}x{_error(text.ratio_error, '.4f')}"
    return [
        Pair(f"Perplexity, {text.source}", figure(text.dense_perplexity), figure(text.sparse_perplexity), change),
        Pair("KL to dense, nats a token", "", f"{figure(text.kl, 3)}{_error(text.kl_error, '.2g')}", ""),
        Pair("Same likeliest next token", "", share(text.agreement, text.agreement_error), ""),
    ]


def _task_pair(task: Any) -> Pair:
    label = f"{task.name}, {task.metric}"
    if task.metric.startswith(("acc", "exact_match", "f1")):
        change = f"{100 * (task.sparse - task.dense):+.1f} points"
        return Pair(label, share(task.dense, task.dense_error), share(task.sparse, task.sparse_error), change)
    texts = [
        f"{figure(v)}{_error(e, '.2g')}" for v, e in ((task.dense, task.dense_error), (task.sparse, task.sparse_error))
    ]
    return Pair(label, *texts, f"{task.sparse - task.dense:+.4g}")


def _unit(speed: SpeedResult) -> str:
    """What one decode step is: a token of one sequence, or one of each sequence of the batch."""
    return "a token" if speed.batch == 1 else "a step"


def _more(speed: SpeedResult) -> str:
    return f"{100 * (1 / speed.gain - 1):.{0 if speed.gain < 0.95 else 1}f} %"


def _speed_pairs(s: SpeedResult) -> list[Pair]:
    saved = s.kernel != "reference"
    rates = [s.batch / seconds for seconds in (s.dense_seconds, s.sparse_seconds)]
    used = [count / seconds / s.read_bandwidth for count, seconds in
            ((s.dense_bytes, s.dense_seconds), (s.sparse_bytes, s.sparse_seconds))]  # fmt: skip
    fewer = f"{100 * (s.sparse_bytes / s.dense_bytes - 1):+.1f} %" if saved else "nothing is saved"
    by_kernel = "" if saved else " by a kernel"
    gain = f"{s.gain:.2f}x" if s.gain >= 1 else f"{s.gain:.2f}x: slower"
    return [
        Pair(f"Time {_unit(s)}", milliseconds(s.dense_seconds), milliseconds(s.sparse_seconds),
             f"{100 * (s.sparse_seconds / s.dense_seconds - 1):+.1f} %"),
        Pair("Tokens a second", figure(rates[0]), figure(rates[1]), f"{100 * (rates[1] / rates[0] - 1):+.1f} %"),
        Pair(f"Bytes {_unit(s)} reads", size(s.dense_bytes), size(s.sparse_bytes) + by_kernel, fewer),
        Pair("Gain that the bytes allow", "", "", f"{s.allowed_gain:.2f}x{by_kernel}"),
        Pair("Gain measured", "", "", gain),
        Pair("Share of read bandwidth", share(used[0]), share(used[1]) if saved else "", ""),
        Pair("Step, kernel", s.dense_variant, f"{s.sparse_variant}, {s.kernel}", ""),
    ]  # fmt: skip


def _row(kind: type, data: dict[str, Any]) -> Any:
    """A row of its dataclass; null stands for a number that was not finite."""
    lost = {f.name for f in fields(kind) if f.type in ("float", float) and data[f.name] is None}
    return kind(**{f.name: math.nan if f.name in lost else data[f.name] for f in fields(kind)})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
