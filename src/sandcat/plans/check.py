"""Whether a recipe and a model go together: looked at before anything changes."""

from __future__ import annotations

from typing import Any

from sandcat.errors import PlanConflict
from sandcat.method import Method
from sandcat.models.quantised import check_floats
from sandcat.models.view import ModelView
from sandcat.plans.plan import Plan


def check_dense(plan: Plan | None, quantisation: Any, *, loaded: bool) -> None:
    """
    Args:
        plan: that of the model, if it has one.
        quantisation: the quantization_config of its config, if there is one.
        loaded: the model is in memory, and not only a file.

    Raises:
        PlanConflict: the model has a plan already, or others have quantised its weights.
    """
    if plan is None:
        return check_floats(quantisation, loaded=loaded)
    stored = " and ".join(step.method.name for step in plan.stored.steps)
    start = (
        f"Its weights are {stored}, also with dense=True, and the floats that they were made from are not in it: start "
        "from the model that it was made from"
        if stored
        else "Start from the model that it was made from, or, in Python, from the dense one in the same files, "
        "sandcat.load(folder, dense=True)"
    )
    raise PlanConflict(f"this model already has a plan ({plan.recipe}). {start}; and give all methods in one recipe.")


def check(methods: list[Method], view: ModelView, *, overlap: bool = False) -> None:
    """The last point where nothing has changed: every method matches, and no slot of a site is claimed twice.

    Args:
        overlap: methods with a sparsity may want one slot, as it will be chosen between them.

    Raises:
        PlanConflict, NothingMatched, UnsupportedModel
    """
    quantisation = getattr(view.config, "quantization_config", None)
    plan = getattr(quantisation, "plan", None)
    check_dense(plan if isinstance(plan, Plan) else None, quantisation, loaded=True)
    claimed: dict[tuple[str, str], Method] = {}
    for method in methods:
        for site in method.select(view):
            view.check_plain(site)
            for name in method.claims(view, site):
                other = claimed.setdefault((name, method.slot), method)
                if other is not method and not (overlap and other.has_sparsity and method.has_sparsity):
                    raise PlanConflict(
                        f"{other.name} and {method.name} both want the {method.slot} of {name}. Keep one of them, or "
                        "give each its own layers, as in cats:layers=0:10 relufy:layers=10:, or its own sites, as in "
                        "cats teal:sites=[q,k,v,o]. If both have a sparsity, a target with allocate=search chooses."
                    )
