"""What mkdocs makes beside the pages in this folder: the home page from README.md, the reference of the command line, a
page for each method (its docstring, its options, its part of methods.md, and the rows of the tables that measure it),
and the source files that pages link to."""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from itertools import accumulate
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

from sandcat.methods import METHODS

ROOT = Path(__file__).parent.parent
MEASURED = ("methods.md", "performance.md")
"""Pages whose tables go to the pages of the methods, row by row."""
LABELS = ("recipe", "step")
"""What the column that names a method is called in these tables."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]*)(#[^)\s]*)?(?=\))")
SOURCE_AND_PAPER = re.compile(r"^Source: \[[^]]*\]\([^)]*\)\. ?(?:Paper: .*?\)\.\s)?", re.S)
OPTION_HEAD = "| option | default | |\n| --- | --- | --- |\n"
OPTION_ROW = re.compile(r"^\| (`.*?`) \| [^|]*\| (.*) \|$", re.M)
LIST_AFTER_LINE = re.compile(r"^(?![-*|>\s]|\d+\. )(.+)\n(?=[-*] |\d+\. )", re.M)
ROW, CODE = re.compile(r"^\|.*$", re.M), re.compile(r"`[^`]*`")


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def rebased(markdown: str, page: str, to: str) -> str:
    """Text of one page as it stands on another: its links lead where they led."""

    def link(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), found[1] or posixpath.basename(page)))
        return posixpath.relpath(target, posixpath.dirname(to) or ".") + (found[2] or "")

    return LINK.sub(link, markdown)


def section(markdown: str, title: str) -> str:
    """What stands under the heading `## title`, up to the next of that level; "" if there is none."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", markdown, re.M | re.S)
    return found[1].strip() if found else ""


def option_table(method: type) -> str:
    rows = ["| option | values | default | what it does |", "| --- | --- | --- | --- |"]
    for option in method.describe():
        cells = [f"`{option['name']}`", option["type"], str(option["default"]).lower(), option["help"]]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows)


def measured(method: str, page: str) -> list[str]:
    """A page's tables with the rows that name a method, or dense, each after the text that says what was measured."""
    found, heading, before = [], "", []
    for block in re.split(r"\n{2,}", re.sub(r"^```.*?^```", "```", read(f"docs/{page}"), flags=re.M | re.S)):
        if block.startswith("#"):
            heading, before = block.splitlines()[0].lstrip("# "), []
            block = "\n".join(block.splitlines()[1:])
        if not block.startswith("|"):
            before = [] if "```" in block else [*before, block]
            continue
        head, rule, *rows = block.splitlines()
        label = next((i for i, cell in enumerate(head.split("|")) if cell.strip().startswith(LABELS)), None)
        names = [row.split("|")[label].strip() for row in rows] if label is not None else []
        names = list(accumulate(names, lambda above, name: name or above))  # an empty cell repeats the one above
        own = [re.search(rf"\b{method}\b", name, re.I) is not None for name in names]
        if any(own):
            kept = [row for row, name, is_own in zip(rows, names, own, strict=True) if is_own or "dense" in name]
            start = max((i for i, text in enumerate(before) if text.endswith(":")), default=0)
            caption = "\n\n".join(before[start:])
            title = "" if any(text.startswith(f"### {heading}\n") for text in found) else f"### {heading}\n\n"
            found.append(f"{title}{caption}\n\n" + "\n".join([head, rule, *kept]))
        before = []
    return found


def docstring(method: type) -> list[str]:
    """Lines of the docstring of its file; the first is the idea."""
    return inspect.getdoc(sys.modules[method.__module__]).splitlines()


def method_page(method: type) -> str:
    """One method, from its source and from what the hand-written pages say about it."""
    to = f"methods/{method.name}.md"
    paper = "\n".join(docstring(method)[1:]).strip()
    paper = re.sub(r"^(Paper|Source|Differs):", r"\n**\1:**", paper, flags=re.M)
    paper = re.sub(r"arXiv\s+(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
    notes = SOURCE_AND_PAPER.sub("", section(read("docs/methods.md"), method.name))
    notes = OPTION_ROW.sub(lambda row: f"- {row[1]}: {row[2]}".replace(r"\|", "|"), notes.replace(OPTION_HEAD, ""))
    tables = [rebased(table, page, to) for page in MEASURED for table in measured(method.name, page)]
    return "\n\n".join(
        [
            f"# {method.name}",
            docstring(method)[0],
            f"```text\n{method.__doc__}\n```",
            f"```\nsandcat sparsify MODEL {method.name} -o OUT\n```",
            f"```python\nimport sandcat\nfrom sandcat.methods import {method.__name__}\n\n"
            f"sandcat.sparsify(model, tokenizer, [{method.__name__}()])\n```",
            paper,
            f"Source: [methods/{method.name}.py](../../src/{method.__module__.replace('.', '/')}.py).",
            f"## Options\n\n{option_table(method)}",
            f"## Notes\n\n{rebased(notes, 'methods.md', to)}" if notes else "",
            "## Measured\n\nWhat names it in the tables of [methods](../methods.md) and "
            "[performance](../performance.md), beside dense. The commands that print them stand there.",
            *(tables or ["Nothing yet."]),
        ]
    )


def command_line() -> str:
    import typer
    from typer.cli import get_docs_for_click

    from sandcat.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="sandcat"), name="sandcat")
    return "# Command line\n" + text.split("\n", 1)[1].replace("```console", "```text")


def on_config(config):
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] += [{method.name: f"methods/{method.name}.md"} for method in METHODS]
    return config


def on_files(files, config):
    made = {f"methods/{method.name}.md": method_page(method) for method in METHODS}
    made |= {"index.md": rebased(read("README.md"), "README.md", "docs/index.md"), "cli.md": command_line()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    pages = files.documentation_pages()
    links = {(link, page.src_uri) for page in pages for link, _ in LINK.findall(page.content_string)}
    for path in sorted({in_repository(*link) for link in links} - {None}):
        kind = "python" if path.endswith(".py") else "text"
        code = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{kind}\n{read(path)}````\n"
        files.append(File.generated(config, f"{path}.md", content=code, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def in_repository(link: str, page: str) -> str | None:
    """The path of a file outside docs/ that a page links to."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return path if link and not path.startswith("docs/") and (ROOT / path).is_file() else None


def on_page_markdown(markdown, page, config, files):
    """Links to source files lead to their pages; and what GitHub's Markdown allows is put as this one wants it."""
    uri = page.file.src_uri

    def link(found: re.Match) -> str:
        path = in_repository(found[1], uri)
        return posixpath.relpath(f"{path}.md", posixpath.dirname(uri) or ".") + (found[2] or "") if path else found[0]

    if uri == "methods.md":
        markdown = cut(markdown)
    parts = re.split(r"(^(`{3,}).*?^\2$)", markdown, flags=re.M | re.S)
    for i in range(0, len(parts), 3):  # between the blocks of code
        text = LIST_AFTER_LINE.sub(r"\1\n\n", LINK.sub(link, parts[i]))
        parts[i] = ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), text)
    return "".join(part for i, part in enumerate(parts) if i % 3 != 2)


def cut(markdown: str) -> str:
    """methods.md without the parts that are pages of their own here."""
    for method in METHODS:
        if text := section(markdown, method.name):
            markdown = markdown.replace(text, f"{docstring(method)[0]} [More](methods/{method.name}.md)")
    return markdown
