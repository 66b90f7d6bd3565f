"""`sandcat show` and `sandcat methods`."""

from __future__ import annotations

from rich.table import Table

from sandcat.cli.options import Folder, Json
from sandcat.cli.printing import out, print_json, print_plan, summary


def show(folder: Folder, as_json: Json = False) -> None:
    """The plan of a sparse model, in words."""
    from sandcat.checkpoints.embedded import resolve
    from sandcat.checkpoints.load import read_plan
    from sandcat.errors import PlanError

    plan = read_plan(resolve(folder))
    if plan is None:
        raise PlanError(f"{folder!r} is a dense model: no plan in its config.json. Make one with sandcat sparsify.")
    print_json(plan.to_json()) if as_json else print_plan(plan)


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
