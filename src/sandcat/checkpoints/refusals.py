"""What is told of folders that cannot be loaded: what they are, and what to do that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sandcat.checkpoints.embedded import EMBEDDED
from sandcat.errors import CheckpointError, PlanError
from sandcat.models.quantised import START, method_of, quantisation_in, said
from sandcat.plans.plan import Plan


def check_is_model(path: Path) -> None:
    """
    Raises:
        CheckpointError: a path of this machine that is no folder with a config.json.
    """
    if (path / "config.json").exists():
        return
    file = path if path.suffix == ".gguf" else next(iter(sorted(path.glob("*.gguf"))), None)
    if file is not None and file.exists():
        raise CheckpointError(
            f"{str(path)!r} is GGUF, which transformers turns into floats: in Python, "
            f"AutoModelForCausalLM.from_pretrained({str(file.parent)!r}, gguf_file={file.name!r}) and "
            "AutoTokenizer.from_pretrained likewise; then sandcat.sparsify and sandcat.save (docs/integrations.md)."
        )
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{str(path)!r} holds adapters of PEFT alone. Merge them into their model first: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload(), and save that."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{str(path)!r} is no model folder. Give a folder with a config.json, a hub id, or {EMBEDDED}."
        )


def check_readable(source: str, plan: Plan | None, quantisation: Any) -> None:
    """
    Raises:
        CheckpointError: weights quantised in a way that transformers does not know. It would warn, and take their codes
            for weights.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if plan is None and quantisation is not None and method_of(quantisation) not in known:
        raise CheckpointError(
            f"{source!r} holds weights that others have quantised ({said(quantisation)}), and this transformers cannot "
            f"read them. {START}"
        )


def unreadable(source: str, local: bool, config: dict[str, Any], error: Exception) -> str:
    """Why a model could not be loaded, when something in transformers has failed, and what to do.

    Args:
        config: the content of its config.json; empty if that was not to be had.
    """
    text = str(error).strip()
    reason = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
    try:
        ours = Plan.from_config(config.get("quantization_config")) is not None
    except PlanError:
        ours = True
    quantisation = None if ours else quantisation_in(config)
    if quantisation is not None:
        return (
            f"{source!r} holds weights that others have quantised ({said(quantisation)}), and transformers could not "
            f"load it as it is ({reason}). That would serve to run it, not to make it sparse. {START}"
        )
    if local:
        return (
            f"{source!r} cannot be loaded as a causal language model ({reason}). If a file was cut off or changed, "
            "fetch or save it again."
        )
    return (
        f"{source!r} is no folder here, and cannot be had from the hub ({reason}). Without network, give a folder or "
        f"{EMBEDDED}."
    )
