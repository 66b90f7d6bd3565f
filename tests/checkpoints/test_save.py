"""Saving is whole or not at all: kills, full disks, existing folders."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import text, tiny, tokenizer

import sandcat
from sandcat.errors import CheckpointError


@pytest.fixture
def sparse():
    model = tiny("llama")
    sandcat.sparsify(model, None, "cats", calibration=text())
    return model


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_ordinary_folder(sparse, tmp_path):
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "deep" / "out")
    names = set(content(folder))
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "sandcat"
    assert os.listdir(folder.parent) == ["out"]
    assert oct(folder.stat().st_mode & 0o777) == "0o755"


def test_existing_folder(sparse, tmp_path):
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    before = content(folder)
    with pytest.raises(CheckpointError, match="--overwrite"):
        sandcat.save(sparse, tokenizer(), folder)
    assert content(folder) == before
    (folder / "old.txt").write_text("old")
    sandcat.save(sparse, tokenizer(), folder, overwrite=True)
    assert set(content(folder)) == set(before)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("a cat")
    with pytest.raises(CheckpointError, match="not a model folder"):
        sandcat.save(sparse, tokenizer(), other, overwrite=True)
    assert (other / "cat.jpg").read_text() == "a cat"


def test_full_disk(sparse, tmp_path, monkeypatch):
    """The older folder stays, nothing else is left, the message says why."""
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    before = content(folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(sparse), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        sandcat.save(sparse, tokenizer(), folder, overwrite=True)
    assert content(folder) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_write_that_really_fails(sparse, tmp_path):
    """A limit on file sizes makes the weights' write fail in the middle."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="was not written"):
            sandcat.save(sparse, tokenizer(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(tmp_path) == []


SAVER = """
import sys, sandcat
sys.path.insert(0, {tests!r})
from tiny import tiny, text, tokenizer
model = tiny("llama", intermediate_size=60_000)
sandcat.sparsify(model, None, "cats", calibration=text(256))
sandcat.save(model, tokenizer(), {folder!r}, overwrite=True)
print("ready", flush=True)
while True:
    sandcat.save(model, tokenizer(), {folder!r}, overwrite=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two folders cannot be exchanged in one step")
def test_kill_during_save(tmp_path):
    """Kill -9 at several moments of saving again and again: the folder is whole, and the next save clears the rest."""
    folder = tmp_path / "out"
    script = SAVER.format(tests=os.path.dirname(os.path.dirname(__file__)), folder=str(folder))
    prompt = torch.arange(5)[None] + 10
    want = None
    for moment in (0.3, 0.05, 0.11, 0.17, 0.23):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(moment)
        process.kill()
        process.wait()
        model, _ = sandcat.load(folder, device="cpu")
        logits = model(prompt).logits
        assert want is None or torch.equal(logits, want)
        want = logits
    small = tiny("llama")
    sandcat.save(small, tokenizer(), folder, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_put_aside_by_a_killed_save_comes_back(sparse, tmp_path):
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    before = content(folder)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = f".out.{platform.node()}.{dead.pid}"
    folder.rename(tmp_path / f"{left}.old-abcdefgh")
    (tmp_path / f"{left}.part-abcdefgh").mkdir()
    (tmp_path / ".out.0.9-mine").mkdir()  # somebody else's, however alike
    with pytest.raises(CheckpointError, match="stop here"):

        def stop(part):
            raise CheckpointError("stop here")

        sandcat.save(sparse, tokenizer(), folder, overwrite=True, finish=stop)
    assert content(folder) == before
    assert sorted(os.listdir(tmp_path)) == [".out.0.9-mine", "out"]


def test_not_overwriting_what_comes_back_or_comes_meanwhile(sparse, tmp_path):
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.rename(tmp_path / f".out.{platform.node()}.{dead.pid}.old-abcdefgh")
    with pytest.raises(CheckpointError, match="--overwrite"):
        sandcat.save(sparse, tokenizer(), folder)
    assert (folder / "config.json").exists()
    other = tmp_path / "other"
    with pytest.raises(CheckpointError, match="--overwrite"):
        sandcat.save(sparse, tokenizer(), other, finish=lambda part: other.mkdir())
    assert os.listdir(other) == []
