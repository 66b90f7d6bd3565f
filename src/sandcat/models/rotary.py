"""How long texts may be, and rotary embeddings whose factors change with the length (longrope, dynamic NTK).

transformers takes their factors from the longest position of a forward. A cache keeps keys as they were turned, so past
the length where factors change, a whole text and one read token by token are not the same.
"""

from __future__ import annotations

import math

from torch import nn
from transformers import PreTrainedConfig

from sandcat.models.families import ARCHITECTURES


def context(config: PreTrainedConfig) -> int | None:
    """Tokens that a text may have; None where the config does not say. "dynamic" is made to go on past the length of
    the config, by its factor."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    factors = [rope.get("factor", 1.0) for rope in _ropes(config) if _grows(rope)]
    return length if length is None else math.floor(length * max([1.0, *factors]))


def steady_length(config: PreTrainedConfig) -> int | None:
    """The longest text that has one set of factors whether it is read whole or token by token; None: any."""
    text = config.get_text_config()
    lengths = [text.max_position_embeddings for rope in _ropes(config) if _grows(rope)]
    lengths += [rope["original_max_position_embeddings"] for rope in _ropes(config) if _kind(rope) == "longrope"]
    return min(lengths, default=None)


def grows(config: PreTrainedConfig) -> bool:
    """Whether past the steady length each token changes the factors: no two steps are the same program then."""
    return any(map(_grows, _ropes(config)))


def length_to_read_again(config: PreTrainedConfig) -> int | None:
    """Past how many tokens transformers' `generate` drops the cache of this family, once, and reads the text again;
    None: it never does."""
    row = ARCHITECTURES.get(getattr(config, "model_type", ""))
    return None if row is None or row.reads_again_past is None else getattr(config, row.reads_again_past, None)


def forget_length(model: nn.Module) -> None:
    """Takes growing factors back to those of a short text: else a text's depend on the longest one of before."""
    if not grows(model.config):
        return
    for module in model.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
        for layers, kind in kinds.items():
            if kind == "dynamic":
                prefix = f"{layers}_" if layers else ""
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))


def _ropes(config: PreTrainedConfig) -> list[dict]:
    """The parameters of each rotary embedding: a family may have one for each kind of layers."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [found] if _kind(found) is not None else [rope for rope in found.values() if isinstance(rope, dict)]


def _kind(rope: dict) -> str | None:
    return rope.get("rope_type")


def _grows(rope: dict) -> bool:
    return _kind(rope) == "dynamic"
