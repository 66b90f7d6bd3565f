"""The table of benchmarks/quality.py: a row is measured once, and what a recipe cannot reach is said."""

from __future__ import annotations

import importlib.util
import random
import string
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny import tiny, tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"


@pytest.fixture
def quality():
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_measured_once(quality, tmp_path, monkeypatch, capsys):
    for part in (tiny("llama"), tokenizer()):
        part.save_pretrained(tmp_path / "model")
    letters = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(letters.choices(string.ascii_lowercase + " ", k=3000)))
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.svg"

    def table():
        words = ["cats@uniform", "sandcat", "relufy", "--target", "bytes=0.8", "--target", "bytes=0.4"]
        files = ["--calibration", tmp_path / "a.txt", "--text", tmp_path / "b.txt", "--out", out, "--plot", plot]
        sizes = ["--model", tmp_path / "model", "--calibration-tokens", 2048, "--tokens", 2048]
        monkeypatch.setattr(sys, "argv", ["quality.py", *words, *map(str, files + sizes)])
        quality.main()
        return capsys.readouterr().out

    first = table()
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `cats@uniform`"] * 2 + ["| `sandcat`"] * 2 + ["| `relufy`"]
    assert abs(float(rows[0][3]) - 0.8) < 0.02 and abs(float(rows[3][3]) - 0.4) < 0.02
    assert "with every site at a sparsity of 0.9 this recipe comes to bytes=" in rows[1][2]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg") and "sandcat" in plot.read_text()

    asked = []
    measure = quality.measure
    monkeypatch.setattr(quality, "measure", lambda options, rows: asked.extend(rows) or measure(options, rows))
    assert table() == first and not asked
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:-1]))  # as if stopped before the last row
    assert table() == first and [row["recipe"] for row in asked] == ["relufy"]
