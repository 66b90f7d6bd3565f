"""What a sweep has measured: its points, which of them no other beats, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandcat.errors import CheckpointError
from sandcat.reports.render import render
from sandcat.support.from_json import record
from sandcat.support.write import replace_text

FORMAT_VERSION = 1
LINES = "sweep.jsonl"
"""The file that a sweep goes on from: settings and machine, then a line a point."""


@dataclass(frozen=True)
class Figures:
    """What was measured of one point, beside the dense model in the same process. Errors are standard errors."""

    ratio: float
    """Sparse perplexity over dense."""
    ratio_error: float
    kl: float
    """Nats a token."""
    kl_error: float
    agreement: float
    bytes: float
    """Bytes that a decode step reads, dense = 1."""
    gain: float
    """Dense time of a decode step over sparse time."""
    milliseconds: float
    """Of the sparse decode step."""
    kernel: str


DENSE = Figures(1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, "")
"""What every point is compared with; its milliseconds are not one number, as they are measured at each point."""


@dataclass(frozen=True)
class Point:
    """One recipe at one budget."""

    recipe: str
    target: str | None
    """None where the recipe's own sparsity holds, or nothing has one."""
    command: str
    """Makes this model again, and its report."""
    seconds: float
    """That making and measuring took."""
    figures: Figures | None = None
    error: str | None = None
    """Why there are no figures: a budget that this recipe cannot meet, say."""


@dataclass(frozen=True)
class Sweep:
    """All points so far, the settings that all of them share, and the machine."""

    settings: dict[str, Any]
    machine: dict[str, str]
    points: list[Point] = field(default_factory=list)

    def front(self, gain: str) -> list[Point]:
        """The points that no other, and not the dense model, equals or beats in both perplexity and `gain`.

        Args:
            gain: "bytes" (the fewer the better) or "gain" (the larger the better).
        """

        def costs(figures: Figures) -> tuple[float, float]:
            return figures.ratio, figures.bytes if gain == "bytes" else -figures.gain

        def beaten(point: Point, figures: Figures) -> bool:
            mine = costs(figures)
            others = [other.figures for other in self.points if other is not point and other.figures is not None]
            return any(a[0] <= mine[0] and a[1] <= mine[1] for a in map(costs, [*others, DENSE]))

        return [point for point in self.points if point.figures is not None and not beaten(point, point.figures)]

    def to_json(self) -> dict[str, Any]:
        """All points, each with the fronts that it is on, the settings and the machine."""
        fronts = {name: self.front(name) for name in ("bytes", "gain")}
        points = [
            {**asdict(point), "front": [name for name, front in fronts.items() if point in front]}
            for point in self.points
        ]
        return {"format_version": FORMAT_VERSION, "settings": self.settings, "machine": self.machine, "points": points}

    def html(self) -> str:
        """One page that needs no other file and no network."""
        return render("sweep.html.jinja", sweep=self, data=self.to_json())

    def write(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the folder cannot be written, or the disk is full.
        """
        head = {"format_version": FORMAT_VERSION, "settings": self.settings, "machine": self.machine}
        lines = [json.dumps(row) for row in (head, *map(asdict, self.points))]
        texts = {LINES: "\n".join(lines), "sweep.json": json.dumps(self.to_json(), indent=1), "sweep.html": self.html()}
        for name, text in texts.items():
            replace_text(folder / name, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """
        Raises:
            CheckpointError: no sweep, a damaged one, or one that a newer version wrote.
        """
        path = folder / LINES
        try:
            head, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if head["format_version"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{str(path)!r} has format version {head['format_version']}: pip install -U sandcat."
                )
            figures = [None if row["figures"] is None else record(Figures, row["figures"]) for row in rows]
            points = [record(Point, {**row, "figures": found}) for row, found in zip(rows, figures, strict=True)]
            return cls(head["settings"], head["machine"], points)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{str(path)!r} is no sweep, or damaged: {type(error).__name__} {error}.") from error
