"""A sweep: what it measures, that nothing is measured twice, what it says, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import main
from tiny import tiny, tokenizer

import sandcat
from sandcat.errors import BadRecipe, CheckpointError
from sandcat.sweeps import sweep as sweeping
from sandcat.sweeps.results import Figures, Point, Sweep
from sandcat.sweeps.sweep import expand

WORDS = "The quick brown fox jumps over the lazy dog, and 12 cats sleep. "


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The model and the settings of a small sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    sandcat.save(tiny("llama"), tokenizer(), folder / "dense")
    (folder / "words.txt").write_text(WORDS * 40)
    (folder / "other.txt").write_text(WORDS[::-1] * 40)
    return str(folder / "dense"), {
        "calibration": str(folder / "words.txt"), "text": str(folder / "other.txt"), "tokens": 512, "context": 20,
        "runs": 1, "compile": False, "device": "cpu", "allocate": "uniform",
    }  # fmt: skip


@pytest.fixture(scope="module")
def swept(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    model, options = asked
    recipes = ["teal", "cats:sparsity=0.3", "int8"]
    return folder, sandcat.sweep(model, recipes, folder=folder, budgets=["bytes=0.8", "bytes=0.05"], **options)


def test_points(swept):
    folder, found = swept
    by = {(point.recipe, point.target): point for point in found.points}
    assert list(by) == [("teal", "bytes=0.8"), ("teal", "bytes=0.05"), ("cats:sparsity=0.3", None), ("int8", None)]
    assert by["teal", "bytes=0.05"].figures is None and "cannot be" in by["teal", "bytes=0.05"].error
    assert 0.7 < by["teal", "bytes=0.8"].figures.bytes < 0.9
    assert by["int8", None].figures.bytes < 0.4
    assert by["int8", None].figures.ratio == pytest.approx(1, abs=0.02)
    assert "sparsify" in by["teal", "bytes=0.8"].command
    assert "teal --bytes 0.8 --allocate uniform" in by["teal", "bytes=0.8"].command
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.html", "sweep.json", "sweep.jsonl"]
    assert Sweep.read(folder) == found
    written = json.loads((folder / "sweep.json").read_text())
    assert [point["recipe"] for point in written["points"]] == [point.recipe for point in found.points]


def test_the_page_is_one_file(swept):
    page = (swept[0] / "sweep.html").read_text()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert page.count("<script") == 2 and "connect-src" not in page and "default-src 'none'" in page


def test_names_do_not_become_code(swept):
    _, found = swept
    point = Point("</script><b>&", None, "x", 1.0, found.points[0].figures)
    page = Sweep(found.settings, found.machine, [point]).html()
    assert "</script><b>" not in page


def test_it_goes_on(swept, asked, monkeypatch):
    """What is there is not measured again; what is new is."""
    folder, found = swept
    model, options = asked
    calls = []

    def make(name, order, *rest, **options):
        calls.append((order.recipe, order.target))
        return original(name, order, *rest, **options)

    original = sweeping.make
    monkeypatch.setattr(sweeping, "make", make)
    recipes = ["teal", "cats:sparsity=0.3", "int8"]
    again = sandcat.sweep(model, recipes, folder=folder, budgets=["bytes=0.8", "bytes=0.05"], **options)
    assert again == found and calls == []
    more = sandcat.sweep(model, ["relufy", "int8"], folder=folder, **options)
    assert calls == [("relufy", None)] and more.points[:-1] == found.points


KILLED = """
import os, sys, sandcat
from sandcat.sweeps import sweep as sweeping
original = sweeping.make
def make(name, order, *rest, **options):
    report = original(name, order, *rest, **options)
    if order.recipe == "int8":
        os.kill(os.getpid(), 9)
    return report
sweeping.make = make
sandcat.sweep(*{args!r}, **{options!r})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_it_goes_on_after_a_kill(asked, tmp_path):
    model, options = asked
    folder, recipes = tmp_path / "sweep", ["relufy", "int8"]
    script = KILLED.format(args=(model, recipes), options={**options, "folder": str(folder)})
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    before = Sweep.read(folder)
    assert [point.recipe for point in before.points] == ["relufy"] and (folder / ".model").exists()
    found = sandcat.sweep(model, recipes, folder=folder, **options)
    assert [point.recipe for point in found.points] == recipes and found.points[0] == before.points[0]
    assert not (folder / ".model").exists()


def test_other_settings_do_not_mix(swept, asked):
    model, options = asked
    with pytest.raises(CheckpointError, match="another runs, and figures"):
        sandcat.sweep(model, ["teal"], folder=swept[0], **{**options, "runs": 2})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format_version": 99}', '{"format_version": 1}\n{"recipe": 1}', "[" * 100_000]
)
def test_damaged(content, tmp_path):
    (tmp_path / "sweep.jsonl").write_text(content)
    with pytest.raises(CheckpointError):
        Sweep.read(tmp_path)


def test_the_front():
    def point(name, ratio, bytes, gain):
        return Point(name, None, "", 1.0, Figures(ratio, 0.0, 0.1, 0.0, 0.9, bytes, gain, 1.0, "numba"))

    found = Sweep({}, {}, [
        point("good", 1.01, 0.8, 1.2), point("cheap", 1.10, 0.6, 1.1), point("beaten", 1.11, 0.7, 1.3),
        point("slow", 1.02, 1.1, 0.9), Point("none", "bytes=0.1", "", 1.0, None, "cannot be met"),
    ])  # fmt: skip
    assert [p.recipe for p in found.front("bytes")] == ["good", "cheap"]
    assert [p.recipe for p in found.front("gain")] == ["good", "beaten"]


def test_expand():
    rows = expand(["sandcat", "teal:sparsity=0.2", "int8 teal", "int8"], ["bytes=0.8", "ppl+1%"], None)
    assert [row[:2] for row in rows] == [
        ("sandcat", "bytes=0.8"), ("sandcat", "quality=ppl+1%"), ("teal:sparsity=0.2", None),
        ("int8 teal", "bytes=0.8"), ("int8 teal", "quality=ppl+1%"), ("int8", None),
    ]  # fmt: skip
    for recipes, budgets in ((["dogs"], ["bytes=0.8"]), (["teal"], ["bites=0.8"]), ([], []), (["sandcat"], [])):
        with pytest.raises(BadRecipe):
            expand(recipes, budgets, None)


def test_command_line(asked, tmp_path, capsys):
    model, options = asked
    words = [model, "cats", "int8", "-o", tmp_path / "out", "--sparsity", "0.2,0.4", "--no-compile"]
    words += [x for k, v in options.items() if k != "compile" for x in (f"--{k}", v)]
    assert main("sweep", *words) == 0
    said = capsys.readouterr()
    assert "sweep.html" in said.out and "3 of 3" in said.err
    assert main("sweep", *words, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 3
    assert main("sweep", model, "cts", "-o", tmp_path / "none") == 2
    assert "did you mean 'cats'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "none").exists()
