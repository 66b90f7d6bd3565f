"""Saving a model as an ordinary Hugging Face folder, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from sandcat.errors import CheckpointError, SandcatError
from sandcat.plan import Plan
from sandcat.progress import are_shown
from sandcat.registration import plan_of


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
    moment, `folder` holds what it held before, or everything.

    Args:
        overwrite: replace an existing folder; without it one is an error.
        card: the text of README.md; default a short one that names the recipe.
        finish: called with the temporary folder when the model is in it, to add or check files; an error in it means
            that nothing is saved.

    Raises:
        CheckpointError: the folder exists, or the disk is full or not writable.
    """
    folder = Path(folder)
    check_free(folder, overwrite)
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}.part-", dir=folder.parent))
        part.chmod(0o755)
        with quiet():
            model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(card or model_card(plan_of(model)), encoding="utf-8")
        mode = (part / "config.json").stat().st_mode  # what the user's umask gives; weights come out private
        for path in part.iterdir():
            path.chmod(mode)
        if finish is not None:
            finish(part)
        _sync(part)
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
    old = part.with_name(part.name.replace(".part-", ".old-"))
    folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Clears what killed saves of the same name left, and brings back an old folder that one had just put aside."""
    for path in folder.parent.glob(f".{folder.name}.*.*-*"):
        pid = path.name.removeprefix(f".{folder.name}.").split(".")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if ".old-" in path.name and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_card(folder: Path, text: str) -> None:
    """Replaces a saved model's README.md, whole or not at all."""
    part = folder / f".README.{os.getpid()}"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / "README.md")


CARD = """\
---
{head}
---

# {name}, sparse by sandcat

Recipe: `{recipe}`. The weights are those of the dense model; the plan in `config.json` and one threshold a neuron say
what is skipped for each token. Without `import sandcat`, this folder loads as the dense model.

```python
import sandcat
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
{table}"""


def model_card(plan: Plan | None, base: str | None = None, table: str = "") -> str:
    """The README.md of a saved model: what it is, how to load it, and the measured table."""
    head = ["library_name: transformers", "tags: [sandcat, contextual-sparsity]"]
    if base and not Path(base).exists():
        head.append(f"base_model: {base}")
    return CARD.format(
        head="\n".join(head),
        name=base or "A model",
        recipe=plan.recipe if plan else "dense",
        table=f"\n## Measured on this saved model, reloaded\n\n{table}\n" if table else "",
    )


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
