"""Every block of code in README.md and docs/ runs, on a tiny model where it needs one; and the site is whole.

A block of Python runs as it stands, with the other ones of its page in one module. In a block of commands those of
sandcat run with short options, scripts read their arguments, and installers and make find what is named. JSON is read.
A block of anything else says so (```text).
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import re
import runpy
import shlex
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from tiny import text, tiny, tokenizer

import sandcat
from sandcat import cli
from sandcat.checkpoints import embedded
from sandcat.checkpoints.load import load
from sandcat.models.families import ARCHITECTURES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NOT_RUN = {
    'device="cuda"': "needs a GPU",
    "--offload": "needs a GPU",
    "piqa": "needs the network: a task of the hub",
    "get_peft_model": "trains: tests/test_integrations.py",
    "tensor_parallel": "needs two processes: tests/checkpoints/test_tensor_parallel.py",
    "sandcat serve": "serves until it is stopped",
    "sandcat sweep": "makes many models: tests/sweeps/test_sweep.py",
}
"""Blocks of Python and commands of sandcat that have this in them are only parsed, and why."""
ELSEWHERE = {
    "vllm": "needs vLLM", "ray": "needs several machines", "torchrun": "needs several processes",
    "accelerate": "needs several processes", "qemu-x86_64": "needs QEMU",
}  # fmt: skip
"""Programs whose arguments nothing here can check."""
SHORT = {"--calibration-tokens": 512, "--tokens": 512, "--runs": 1, "--steps": 2, "--max-new-tokens": 4}
"""Options that commands of sandcat get here, if they have them."""
MEASURED = ("quickstart.md", "measuring.md")
"""Pages on which models that are made are measured too, as that takes longest."""
DONE: dict[tuple, Path] = {}
"""What commands of pages made, so that the same command on two pages runs once."""
FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2$", re.M | re.S)


def blocks(page: str | Path, *kinds: str) -> list[tuple[int, str]]:
    """Line and text of a page's blocks of some languages ("" for none)."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    found = [(text.count("\n", 0, block.start(4)), block[4], block[3]) for block in FENCE.finditer(text)]
    return [(line, code) for line, code, kind in found if kind in kinds]


def not_run(code: str) -> bool:
    return any(part in code for part in NOT_RUN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny dense model and a sparse one."""
    place = tmp_path_factory.mktemp("models")
    model = tiny("llama", num_hidden_layers=5)
    sandcat.save(model, tokenizer(), place / "dense")
    sandcat.sparsify(model, tokenizer(), "cats:sparsity=0.4", calibration_tokens=512)
    sandcat.save(model, tokenizer(), place / "sparse")
    return {"dense": place / "dense", "sparse": place / "sparse"}


@pytest.fixture
def workplace(folders, tmp_path, monkeypatch):
    """A folder of its own, in which the embedded model is the tiny one, and nothing lasts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedded, "embedded_folder", lambda: folders["dense"])
    monkeypatch.setattr("builtins.input", lambda prompt="": "")
    monkeypatch.setitem(sandcat.sparsify.__kwdefaults__, "calibration_tokens", SHORT["--calibration-tokens"])
    families = dict(ARCHITECTURES)
    yield tmp_path
    ARCHITECTURES.clear()
    ARCHITECTURES.update(families)


def write_texts(code: str) -> None:
    """The text files that a block names, each with other words; a .jsonl also has questions."""
    for name in set(re.findall(r"[\w.-]+\.(?:txt|jsonl)\b", code)):
        draw = random.Random(name)
        lines = ["".join(draw.choices("abcdefgh ", k=60)) for _ in range(40)]
        rows = [json.dumps({"text": line, "query": line, "choices": ["a", "b"], "gold": 0}) for line in lines]
        Path(name).write_text("\n".join(rows if name.endswith("jsonl") else lines))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python(page, folders, workplace, monkeypatch):
    monkeypatch.setattr(
        sandcat, "sweep", partial(sandcat.sweep, calibration_tokens=512, tokens=512, runs=1, compile=False)
    )
    run_python(blocks(page, "python"), folders, workplace / f"{page.stem}_blocks.py")


def run_python(found: list[tuple[int, str]], folders: dict[str, Path], script: Path) -> None:
    """Runs blocks as one module, whose lines are those of the page."""
    text = ""
    for line, code in found:
        ast.parse(code)
        if not not_run(code):
            text += "\n" * (line - text.count("\n")) + code
    write_texts(text)
    script.write_text(text, encoding="utf-8")
    dense, words = load(folders["dense"], device="cpu")
    given = {
        "MODEL": str(folders["dense"]),
        "tokenizer": words,
        "dense": dense,
        "sparse": load(folders["sparse"], device="cpu")[0],
    }
    runpy.run_path(str(script), {**given, "model": load(folders["dense"], device="cpu")[0]}, run_name="page")


OF = re.compile(r"((?:`[\w.]+`[^`.\[]*)+)\bof \[[^\]]*\]\(([^)#]+\.py)\)")
"""Names that a page says a file has: `NAME` of [file](path)."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_are_in_the_files_that_pages_name(page):
    for names, file in OF.findall(page.read_text(encoding="utf-8")):
        code = (page.parent / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"\b{re.escape(name)}\b", code), f"{name} is not in {file}"


def commands(text: str) -> list[list[str]]:
    """The commands of a block, split; of a session ("$ ...") without what it prints."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    split = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if word != "..."] for words in split if words]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "", "bash")], ids=lambda page: page.name)
def test_commands(page, folders, workplace, monkeypatch):
    made = {}
    for _, code in blocks(page, "", "bash"):
        if code.startswith("{"):  # rows of JSON
            assert all(json.loads(line) for line in code.splitlines())
            continue
        for words in commands(code):
            program, *arguments = words
            if program == "sandcat":
                run_sandcat(arguments, folders, made, monkeypatch, measure=page.name in MEASURED)
            elif program == "python":
                check_python(arguments, monkeypatch)
            elif program == "pip":
                check_pip(arguments)
            elif program == "make":
                targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
                assert set(arguments) <= set(targets), words
            else:
                assert program in ELSEWHERE, f"{page.name}: what is {program!r}? Mark what is no command as ```text."


def run_sandcat(
    arguments: list[str], folders: dict[str, Path], made: dict[str, Path], monkeypatch, measure: bool = False
) -> None:
    """Parses a command, and runs it where it can be run here; what one command of a page writes the next can read."""
    group = typer.main.get_command(cli.app)
    name, *rest = arguments
    assert name in group.commands, f"sandcat has no command {name!r}"
    command = group.commands[name]
    command.make_context(name, list(rest))
    if not_run(shlex.join(["sandcat", *arguments])):
        return
    write_texts(" ".join(rest))
    if "-o" in rest:
        output = rest.index("-o") + 1
        same = (measure, name, *rest[:output], *rest[output + 1 :])
        if same in DONE:  # on another page
            made[rest[output]] = DONE[same]
            return
        made[rest[output]] = DONE[same] = Path.cwd() / f"{rest[output]}-{len(DONE)}"
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    places = {"MODEL": folders["dense"], "smollm2-135m": folders["dense"], **made}
    for i, word in enumerate(rest):
        if re.fullmatch(r"[\w-]+/[\w.-]+", word):  # an id of the hub
            rest[i] = str(folders["dense"])
        elif word in places or i == 0:
            rest[i] = str(places.get(word, folders["sparse"]))
    short = SHORT | ({"--tokens": 8192} if "--batch" in rest else {})  # each sequence is a window of its own
    for option, value in short.items():
        rest += [option, str(value)] if option in known else []
    rest += ["--no-compile"] if "--no-compile" in known else []
    rest += ["--no-measure"] if "--no-measure" in known and not measure else []
    monkeypatch.setattr(sys, "argv", ["sandcat", name, *rest])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, arguments


class Parsed(Exception):
    """A script has read its arguments."""


def check_python(arguments: list[str], monkeypatch) -> None:
    """The script is there, and takes these arguments."""
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments
        assert all((ROOT / word).exists() for word in arguments[2:] if "/" in word), arguments
        return
    script = ROOT / arguments[0]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *arguments[1:]])
        patch.syspath_prepend(script.parent)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def check_pip(arguments: list[str]) -> None:
    """What is to be installed has a name, and extras of ours exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("install", choices=["install"])
    parser.add_argument("what", nargs="+")
    parser.add_argument("-e", action="store_true")
    parser.add_argument("-c", type=lambda name: (ROOT / name).read_text())
    parser.add_argument("--no-deps", action="store_true")
    for what in parser.parse_intermixed_args(arguments).what:
        requirement = Requirement(re.sub(r"^\.", "sandcat", what))
        if requirement.name == "sandcat":
            assert requirement.extras <= set(extras), what


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_other_blocks(page):
    kinds = {block[3] for block in FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert kinds <= {"", "bash", "python", "json", "text"}
    for _, code in blocks(page, "json"):
        json.loads(code)


@pytest.mark.parametrize("method", sandcat.METHODS, ids=lambda method: method.name)
def test_pages_of_methods(method, folders, workplace, monkeypatch):
    """They are made: with each option, its default, and every row that measures the method."""
    page = hooks().method_page(method)
    for option in method.describe():
        assert f"| `{option['name']}` |" in page
    text = hooks().section((ROOT / "docs" / "methods.md").read_text(), method.name)
    defaults = {option["name"]: str(option["default"]).lower() for option in method.describe()}
    for name, default in re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.M):  # as they are said by hand
        assert defaults[name] == default, name
    measured = re.findall(
        rf"^\| (?:\| )?`[^`|]*\b{method.name}\b[^`|]*` \|.*$", (ROOT / "docs" / "methods.md").read_text(), re.M
    )
    assert all(row in page for row in measured)
    run_python(blocks(page, "python"), folders, workplace / f"{method.name}_page.py")
    (first, *_) = blocks(page, "")
    for words in commands(first[1]):
        run_sandcat(words[1:], folders, {}, monkeypatch)


def test_format_of_the_plan():
    """The example is a plan, and the page names every key that plans have."""
    page = ROOT / "docs" / "plan-format.md"
    ((_, example),) = blocks(page, "json")
    plans = [sandcat.Plan.from_json(json.loads(example))]
    for recipe in ("int8 teal", "rsparse:alpha=[0.7]", "coreinfer:rule=similarity,clusters=2", "relufy"):
        plans.append(sandcat.sparsify(tiny("llama"), tokenizer(), recipe, calibration=text()))

    def keys(data: dict) -> set[str]:
        inside = [keys(value) for value in data.values() if isinstance(value, dict)]
        return set(data).union(*inside)

    text_of_page = page.read_text(encoding="utf-8")
    for plan in plans:
        data = plan.to_json()
        specs = [spec for method in data.pop("methods") for spec in method.pop("sites").values()]
        for key in keys(data).union(*map(keys, specs)):
            assert f"`{key}`" in text_of_page, key


def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation():
    def pages(entry) -> list[str]:
        inside = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for part in inside for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(here | {"index.md", "cli.md"})


def test_site(tmp_path):
    """It is built without a warning (links, anchors, navigation), and its pages load nothing from elsewhere."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = list(tmp_path.rglob("*.html"))
    assert {method.name for method in sandcat.METHODS} <= {page.stem for page in pages}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loads = [
            *re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\"'\s>]*)", html),
            *re.findall(r"<link\b[^>]*?\bhref=[\"']?((?:https?:)?//[^\"'\s>]*)", html),
        ]
        assert not loads, (page, loads)
        assert "mermaid" not in html  # whose script the theme would fetch
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style
