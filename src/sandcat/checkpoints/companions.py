"""What lies beside weights and config where a model comes from, and belongs to its copies: processors, licences."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from sandcat.checkpoints.files import TEXTS, fetch_texts

REPLACED = {
    "config.json", "generation_config.json", "README.md", "report.json", "adapter_config.json", "trainer_state.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
}  # fmt: skip
"""What speaks of the weights or of the tokenizer: model and tokenizer write it anew, or it is true no longer."""
INDICES = ".index.json"


def copy_companions(model: nn.Module, tokenizer, folder: Path) -> None:
    """Copies to `folder`, which model and tokenizer have been saved to, what it lacks of the model's source.

    Where a model was made and not loaded, or its source is gone, that is nothing.
    """
    source = source_of(model)
    if source is None:
        return
    foreign: set[str] = set()
    if getattr(tokenizer, "name_or_path", None) != model.config.name_or_path:
        foreign = set(getattr(tokenizer, "vocab_files_names", {}).values())  # of another tokenizer than this one
    for path in companions(source):
        if path.name not in foreign and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def companions(source: Path) -> Iterator[Path]:
    """Those of a folder.

    A link out of it is none: a folder may come from anyone, and what it links to would be published with the copy.
    """
    home = source.resolve()
    places = [home]
    if home.parent.name == "snapshots":  # in the cache of the hub, whose snapshots are links to files beside them
        places.append(home.parent.parent / "blobs")
    for path in sorted(home.iterdir()):
        if path.name in REPLACED or path.name.endswith(INDICES) or path.name.startswith("."):
            continue
        known = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in TEXTS)
        if known and path.is_file() and any(path.resolve().is_relative_to(place) for place in places):
            yield path


def source_of(model: nn.Module) -> Path | None:
    """The folder that a model was loaded from, of a model of the hub its snapshot; None if there is none."""
    name = model.config.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        return fetch_texts(name, getattr(model.config, "_commit_hash", None))
    except (OSError, ValueError):  # no such model, neither in the cache nor to be had, or no name of one
        return None
