"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sandcat.errors import CheckpointError


def replace_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise CheckpointError(f"{str(path)!r} was not written: {error.strerror or error}.") from error
