"""Saving a model as an ordinary Hugging Face folder, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from torch import nn

from sandcat.checkpoints.card import model_card
from sandcat.checkpoints.companions import copy_companions
from sandcat.checkpoints.pretrained import keep_floats
from sandcat.checkpoints.quantizer import plan_of
from sandcat.models.quantised import check_floats
from sandcat.models.unwrapped import check_unwrapped
from sandcat.support.progress import are_shown
from sandcat.support.whole_folder import whole_folder

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
    """Writes an ordinary Hugging Face folder, whole or not at all (see `whole_folder`).

    What else the folder of the hub or of this machine has that the model was loaded from, such as a processor's config
    or a licence, comes along (see `companions.py`).

    Args:
        overwrite: replace an existing folder; without it one is an error.
        card: the text of README.md; default a short one that names the recipe.
        finish: called with the temporary folder when the model is in it, to add or check files; an error in it means
            that nothing is saved.

    Raises:
        CheckpointError: the folder exists, or the disk is full or not writable.
        PlanError: what is to be saved is not what loading will build.
        UnsupportedModel: unmerged adapters, or a wrapper around a model. PlanConflict: weights quantised by others.
    """
    check_unwrapped(model)
    if plan_of(model) is None:
        check_floats(getattr(model.config, "quantization_config", None), loaded=True)
        keep_floats(model)
    folder = Path(folder)
    with whole_folder(folder, overwrite) as part:
        with quiet():
            model.save_pretrained(part, max_shard_size=SHARD)
        tokenizer.save_pretrained(part)
        copy_companions(model, tokenizer, part)
        (part / "README.md").write_text(card or model_card(plan_of(model)), encoding="utf-8")
        if finish is not None:
            finish(part)
    return folder


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
