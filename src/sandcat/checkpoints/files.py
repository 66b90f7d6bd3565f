"""What the files of a checkpoint say, checked before a model of that size is made or a tensor of them is read.

Files may come from anyone. Weights are read from safetensors only, which hold numbers and no code; an index names files
of its own folder; and a config may not ask for more numbers than the files have.
"""

from __future__ import annotations

import glob
import json
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sandcat.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TEXTS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.bpe", "*.vocab", "*.spm", "*.txt", "*.md", "*.py",
    "*LICEN[CS]E*", "*NOTICE*", "COPYING*",
)  # fmt: skip
"""What a repository of the hub has beside its weights; code runs only where it is trusted."""
TEMPLATES = "additional_chat_templates/*.jinja"
"""Those that have names."""
FOLDERS = "*/*"
"""Where repositories keep the same model in other formats."""
COUNTS = 4096
"""A config's counts (num_hidden_layers, num_labels, ...) go up to this, or to the number of tensors in the files."""
BUFFERS = 2**24
"""Numbers that a model may hold beside those in its files, such as the frequencies of its positions."""


def fetch_texts(name: str, revision: str | None = None) -> Path:
    """The folder with a model of the hub, without its weights."""
    return Path(snapshot_download(name, revision=revision, allow_patterns=[*TEXTS], ignore_patterns=FOLDERS))


def fetch(name: str) -> Path:
    """The folder with a model of the hub: its texts, and the weights that `shards` names."""
    weights = [glob.escape(path.name) for path in shards(fetch_texts(name))]
    return Path(snapshot_download(name, allow_patterns=[*weights, TEMPLATES]))


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: the file cannot be read, or is no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{str(path.parent)!r} is no model folder: {path.name} cannot be read ({error.strerror})."
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{str(path)!r} is not valid JSON: the folder is damaged.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{str(path)!r} holds no JSON object: the folder is damaged.")
    return data


def shards(folder: Path) -> list[Path]:
    """The files that hold a model's weights, of which an index, if there is one, has the names.

    Raises:
        CheckpointError: the index is damaged, or names something that is no safetensors file of this folder.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{str(folder / INDEX)!r} has no weight_map: the folder is damaged.")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{str(folder / INDEX)!r} names {name!r} as a file of weights. Such a file lies in the folder itself, "
                "and its name ends in .safetensors: nothing else is opened."
            )
    return [folder / name for name in sorted(set(names.values()))]


def sizes(folder: Path) -> dict[str, int]:
    """Of each tensor in the files, how many numbers it has.

    Raises:
        CheckpointError: no weights in safetensors files, or damaged ones.
    """
    found: dict[str, int] = {}
    for path in shards(folder):
        if not path.exists():
            raise CheckpointError(
                f"{str(folder)!r} cannot be loaded: it has no {path.name}. Weights are read from safetensors only; "
                "other formats can hold code."
            )
        try:
            with safe_open(path, "pt") as file:
                found |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{str(path)!r} cannot be loaded ({error}). If it was cut off or changed, fetch or save it again."
            ) from None
    return found


def check_counts(data: Any, most: int) -> None:
    """
    Args:
        data: of a config.json, or a part of it.

    Raises:
        CheckpointError: a count in it is larger than `most`, so that only counting would take long.
    """
    for key, value in data.items() if isinstance(data, dict) else ():
        check_counts(value, most)
        if key.startswith("num_") and isinstance(value, int | float) and not value <= most:
            raise CheckpointError(f"config.json cannot be loaded: {key} is {value}, and the files hold {most} tensors.")


def check_size(config: PreTrainedConfig, numbers: int, **options: Any) -> None:
    """Makes the model without memory for its numbers, to count them.

    Raises:
        CheckpointError: there are more of them than in the files.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if wanted > numbers or sum(buffer.numel() for buffer in model.buffers()) > BUFFERS:
        raise CheckpointError(
            f"the model of config.json has {wanted:,} weights, and the files hold {numbers:,}: they do not belong "
            "together, or something is missing."
        )
