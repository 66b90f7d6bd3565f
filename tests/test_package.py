"""What `pip install sandcat` gives: built, installed into an empty environment, and run there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from tiny import tiny, tokenizer

import sandcat

ROOT = Path(__file__).parent.parent


def run(*args, **options) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, args)], capture_output=True, text=True, env=clean, **options)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def bin(built, tmp_path_factory):
    """The programs of an environment that holds the wheel and, by a .pth file, the libraries installed here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index",
        built[".whl"])  # fmt: skip
    own = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    libraries = [path for path in sys.path if path.endswith("-packages")]
    Path(own, "libraries.pth").write_text("\n".join(libraries))
    assert own in run(programs / "python", "-c", "import sandcat; print(sandcat.__file__)", cwd=folder)
    return programs


def test_what_is_in_it(built):
    wheel = set(zipfile.ZipFile(built[".whl"]).namelist())
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "sandcat").rglob("*")
        if path.suffix in (".py", ".jinja", ".typed")
    }
    info = f"sandcat-{sandcat.__version__}.dist-info"
    assert wheel == sources | {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    said = zipfile.ZipFile(built[".whl"]).read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("Provides-Extra")] == [
        "demo", "dev", "eval", "serving", "vllm",
    ]  # fmt: skip
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "tests/test_package.py", "src/sandcat/py.typed"} <= names


def test_it_starts_at_once(bin, tmp_path):
    said = run(bin / "sandcat", "--version", cwd=tmp_path).splitlines()
    assert said[0] == f"sandcat {sandcat.__version__}"
    assert {line.split()[0] for line in said} >= {"python", "torch", "transformers", "device"}
    # Of the processor, beside what it takes to load torch there: neither the machine nor its load decides.
    torch, helps, imports = (
        min(processor_seconds(*command, cwd=tmp_path) for _ in range(3))
        for command in (
            [bin / "python", "-c", "import torch"],
            [bin / "sandcat", "--help"],
            [bin / "python", "-c", "import sandcat"],
        )
    )
    assert helps < torch / 6
    assert imports < torch / 10


def processor_seconds(*command, cwd) -> float:
    before = os.times()
    run(*command, cwd=cwd)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def test_it_makes_a_model_sparse(bin, tmp_path):
    sandcat.save(tiny("llama"), tokenizer(), tmp_path / "dense")
    (tmp_path / "words.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    run(bin / "sandcat", "sparsify", "dense", "cats:sparsity=0.5", "-o", "out", "--calibration", "words.txt",
        "--no-measure", cwd=tmp_path)  # fmt: skip
    load = """
import sandcat
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained("out").model.layers[0].mlp).__name__)
"""
    assert run(bin / "python", "-c", load, cwd=tmp_path).strip() == "SparseMLP"
