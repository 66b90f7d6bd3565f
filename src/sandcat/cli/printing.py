"""What the commands print: JSON for machines, tables for people."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

out, err = Console(), Console(stderr=True)


def print_json(data) -> None:
    """To standard output, for programs."""
    print(json.dumps(data, indent=2))


def print_report(report, as_json: bool) -> None:
    """As a table, or for programs."""
    print_json(report.to_json()) if as_json else out.print(report.table())


def plain(text: str) -> Text:
    """Text from a file, without what a terminal or rich would take for a command."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def print_plan(plan) -> None:
    """Its methods with what they decided for each site, the budget and the calibration."""
    from sandcat.reports import wording

    for step in plan.steps:
        out.print(f"[bold]{step.method}[/bold]: {summary(type(step.method))}")
        rows = [
            {"site": site, **{key: value for key, value in spec.items() if not isinstance(value, dict)}}
            for site, spec in step.sites.items()
        ]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = Table(*(Column(plain(column)) for column in columns), box=None, pad_edge=False)
        for row in rows:
            values = (row.get(column, "") for column in columns)
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else plain(str(value)) for value in values))
        out.print(table)
    if plan.budget is not None:
        out.print(plain(wording.budget(plan.budget)))
    if plan.calibration is not None:
        c = plan.calibration
        how = "each layer after the sparse ones before it" if c.sequential else "all layers dense"
        out.print(plain(f"calibrated on {c.source}: {c.tokens} tokens, sha256 {c.sha256[:12]}, {how}"))


def summary(method: type) -> str:
    """The first line of a method's file."""
    return str(sys.modules[method.__module__].__doc__).splitlines()[0]
