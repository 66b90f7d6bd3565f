"""Pages that need no other file and no network: a template of templates/, its style, and what it is to say."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> str:
    """A file of templates/, filled in; a value that it lacks is an error."""
    import jinja2

    from sandcat.reports import wording

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    for name in ("figure", "milliseconds", "per_cent", "size", "tie"):
        environment.filters[name] = getattr(wording, name)
    return environment.get_template(template).render(**values)
