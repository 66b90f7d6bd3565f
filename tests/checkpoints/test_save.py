"""Saving is whole or not at all: kills, full disks, existing folders."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

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


@pytest.mark.parametrize("umask, folders, files", [(0o022, "0o755", "0o644"), (0o077, "0o700", "0o600"),
                                                   (0o002, "0o775", "0o664")])  # fmt: skip
def test_modes(sparse, tmp_path, umask, folders, files):
    """What the user's umask gives, to folders inside the folder too: several chat templates make one."""
    tok = tokenizer()
    tok.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}"}
    before = os.umask(umask)
    try:
        folder = sandcat.save(sparse, tok, tmp_path / "out", finish=lambda part: (part / "more").mkdir())
    finally:
        os.umask(before)
    found = {path: oct(path.stat().st_mode & 0o777) for path in [folder, *folder.rglob("*")]}
    inside = {path for path in found if path.is_dir()}
    assert {path.name for path in inside} == {"out", "additional_chat_templates", "more"}
    assert {found[path] for path in inside} == {folders}
    assert {found[path] for path in found.keys() - inside} == {files}
    assert sandcat.load(folder, device="cpu")[1].chat_template == tok.chat_template


@pytest.mark.skipif(sys.platform == "win32", reason="needs modes")
def test_a_group_shares_its_folders(sparse, tmp_path):
    """A folder that hands its group on (setgid) goes on doing so."""
    tmp_path.chmod(0o2775)
    assert sandcat.save(sparse, tokenizer(), tmp_path / "out").stat().st_mode & 0o2000


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


@pytest.mark.parametrize("stays", [False, True])
def test_a_failure_says_what_is_left(sparse, tmp_path, monkeypatch, stays):
    """Nothing, whatever the modes in it; or a folder that the system keeps. Folders made on the way go too."""
    if stays:
        monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)

    def fail(part):
        (part / "inside" / "deeper").mkdir(parents=True)
        (part / "inside").chmod(0o600)
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(CheckpointError) as caught:
        sandcat.save(sparse, tokenizer(), tmp_path / "deep" / "er" / "out", finish=fail)
    assert ("Nothing of it was left behind" in str(caught.value)) == (not stays)
    if stays:
        [part] = (tmp_path / "deep" / "er").iterdir()
        assert str(part) in str(caught.value)
    else:
        assert os.listdir(tmp_path) == []


def test_links_are_not_followed_when_a_folder_is_removed(sparse, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    other.chmod(0o755)
    folder = sandcat.save(sparse, tokenizer(), tmp_path / "out")
    (folder / "link").symlink_to(other, target_is_directory=True)
    sandcat.save(sparse, tokenizer(), folder, overwrite=True)
    assert other.stat().st_mode & 0o777 == 0o755 and not (folder / "link").exists()


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_as_a_user_who_is_not_root(sparse):
    """Whom modes bind: root may look into a folder that nobody may."""
    tok = tokenizer()
    tok.chat_template = {"default": "a", "tool_use": "b"}
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, -1)
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            with suppress(BaseException):
                sandcat.save(sparse, tok, f"{folder}/out")
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert os.listdir(folder) == ["out"]
        assert sandcat.load(f"{folder}/out", device="cpu")[1].chat_template == tok.chat_template


SAVER = """
import os, shutil, signal, sys, time
sys.path.insert(0, {tests!r})
import sandcat
from tiny import tiny, text, tokenizer
folder, moments = sys.argv[1], sys.argv[2:]
model = tiny("llama", intermediate_size=60_000)
sandcat.sparsify(model, None, "cats", calibration=text(256))
sandcat.save(model, tokenizer(), folder)
for number, moment in enumerate(moments):
    if (saver := os.fork()) == 0:
        while True:
            sandcat.save(model, tokenizer(), folder, overwrite=True)
    time.sleep(float(moment))
    os.kill(saver, signal.SIGKILL)
    assert os.waitpid(saver, 0)[1] == signal.SIGKILL
    shutil.copytree(folder, folder + str(number))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two folders cannot be exchanged in one step")
def test_kill_during_save(tmp_path):
    """Kill -9 at several moments of saving again and again: the folder is whole, and the next save clears the rest."""
    folder = tmp_path / "out"
    moments = ("0.3", "0.05", "0.11", "0.17", "0.23")
    script = SAVER.format(tests=str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", script, str(folder), *moments], check=True)
    prompt = torch.arange(5)[None] + 10
    whole = [Path(f"{folder}{number}") for number in range(len(moments))]
    first, *others = (sandcat.load(path, device="cpu")[0](prompt).logits for path in whole)
    assert all(torch.equal(logits, first) for logits in others)
    for path in whole:
        shutil.rmtree(path)
    sandcat.save(tiny("llama"), tokenizer(), folder, overwrite=True)
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
