"""Writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from sandcat.errors import CheckpointError, SandcatError


@contextlib.contextmanager
def whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write into, beside `folder`: it takes that name when the context ends well.

    Killed at any moment, `folder` holds what it held before, or everything. (Where the system cannot exchange two
    folders in one step, as Linux can, the older one may stand beside it under a hidden name; the next call puts it
    back.)

    Args:
        overwrite: replace an existing model folder; without it one is an error.

    Raises:
        CheckpointError: the folder exists, or the disk is full or not writable.
    """
    part = None
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        check_free(folder, overwrite)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{platform.node()}.{os.getpid()}.part-", dir=folder.parent))
        yield part
        _open_to_others(part)
        _sync(part)
        check_free(folder, overwrite)
        _swap(part, folder)
    except Exception as error:
        gone = part is None or _remove(part)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        reason = None if isinstance(error, SandcatError) else _reason(error)
        if reason is None:
            raise
        left = "Nothing of it was left behind." if gone else f"{str(part)!r} could not be removed: remove it."
        raise CheckpointError(f"{str(folder)!r} was not written: {reason}. {left}") from error
    finally:
        if part is not None:
            _remove(part)  # the older folder, or what an interrupt left


def _reason(error: Exception) -> str | None:
    """What the system did not allow; None if the error is no such thing."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "the disk is full"
    return text if isinstance(error, OSError) or "os error" in text.lower() else None


def _open_to_others(folder: Path) -> None:
    """Gives a folder and everything in it the modes that the user's umask gives new ones.

    Files of weights and temporary folders come out private; config.json is written like any file.
    """
    file = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for path in [folder, *folder.rglob("*")]:
        shared = path.stat().st_mode & stat.S_ISGID  # of a folder that a group shares
        path.chmod(file | (file & 0o444) >> 2 | shared if path.is_dir() else file)


def _remove(folder: Path) -> bool:
    """Removes a folder, whatever the modes of those inside it, and says whether nothing is left."""
    for here, inside, _ in os.walk(folder):  # one is opened before what is in it is looked for
        for path in (Path(here, name) for name in inside):
            if not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


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
    _remove(old)


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
            _remove(path)


def _alive(pid: int) -> bool:
    return pid == os.getpid() or psutil.pid_exists(pid)
