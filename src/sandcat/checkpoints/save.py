"""Saving a model as an ordinary Hugging Face folder, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
from torch import nn

from sandcat.checkpoints.card import model_card
from sandcat.checkpoints.quantizer import plan_of
from sandcat.errors import CheckpointError, SandcatError
from sandcat.support.progress import are_shown

SHARD = "5GB"
"""Size of a file, at most: weights that are laid out for the kernels are copied back a file at a time."""


def save(
    model: nn.Module,
    tokenizer,
    folder: str | Path,
    *,
    overwrite: bool = False,
    card: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Writes an ordinary Hugging Face folder, whole or not at all.

    Everything goes to a temporary folder beside `folder` first, and is renamed when it is complete. Killed at any
    moment, `folder` holds what it held before, or everything. (Where the system cannot exchange two folders in one
    step, as Linux can, the older one may stand beside it under a hidden name; the next save puts it back.)

    Args:
        overwrite: replace an existing folder; without it one is an error.
        card: the text of README.md; default a short one that names the recipe.
        finish: called with the temporary folder when the model is in it, to add or check files; an error in it means
            that nothing is saved.

    Raises:
        CheckpointError: the folder exists, or the disk is full or not writable.
    """
    folder = Path(folder)
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        check_free(folder, overwrite)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{platform.node()}.{os.getpid()}.part-", dir=folder.parent))
        part.chmod(0o755)
        with quiet():
            model.save_pretrained(part, max_shard_size=SHARD)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card or model_card(plan_of(model)), encoding="utf-8")
        mode = (part / "config.json").stat().st_mode  # what the user's umask gives; weights come out private
        for path in part.iterdir():
            path.chmod(mode)
        if finish is not None:
            finish(part)
        _sync(part)
        check_free(folder, overwrite)
        _swap(part, folder)
    except SandcatError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or "os error" in str(error).lower() or "No space left" in str(error):
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            reason = "the disk is full" if full else str(error)
            raise CheckpointError(
                f"{str(folder)!r} was not written: {reason}. Nothing of it was left behind."
            ) from error
        raise
    finally:
        if part is not None and part.exists():
            shutil.rmtree(part, ignore_errors=True)
    return folder


def check_free(folder: Path, overwrite: bool) -> None:
    """
    Raises:
        CheckpointError: something stands at `folder` that may not be replaced.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not overwrite:
        raise CheckpointError(f"{str(folder)!r} exists. Choose another name, or allow replacing it with --overwrite.")
    if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists()):
        raise CheckpointError(f"{str(folder)!r} is not a model folder, and --overwrite replaces nothing else.")


def _sync(folder: Path) -> None:
    """Asks the disk to hold every file before the rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _swap(part: Path, folder: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    if _exchange(part, folder):  # `part` is the older one now
        return
    old = part.with_name(part.name.replace(".part-", ".old-"))
    folder.rename(old)
    try:
        part.rename(folder)
    except BaseException:
        if not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, where the system and its file system can; else False, and nothing has changed."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove_stale(folder: Path) -> None:
    """Clears what killed saves of the same name left, and brings back an old folder that one had just put aside."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.{re.escape(platform.node())}\.(\d+)\.(part|old)-\w{{8}}")
    for path in list(folder.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match is None or _alive(int(match[1])):
            continue
        if match[2] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    return pid == os.getpid() or psutil.pid_exists(pid)


@contextlib.contextmanager
def quiet():
    """Keeps off transformers' report on the thresholds that a dense load leaves over, and its bars unless ours show."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not are_shown():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
