"""The model families: one row of data each.

This is the only file that knows the module names of Hugging Face models. To support another family, add one row to
`ARCHITECTURES`; the contract tests pick it up (tests/tiny.py builds a small random model of every row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sandcat.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where one family keeps its parts; the defaults are Llama's."""

    layers: str = "model.layers"
    """Path of the decoder layers."""
    mlp: str = "mlp"
    """Path of the gated MLP inside a layer."""
    gate: str = "gate_proj"
    """Gate projection inside the MLP. The same name as `up` means one fused matrix, gate rows first."""
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "hidden_act"
    """Name of the config entry that holds the activation of the gate."""
    attention: str = "self_attn"
    """Path of the attention inside a layer."""
    q: str = "q_proj"
    """Query projection inside the attention. The same name as `k` and `v` means one fused matrix."""
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused_step: bool = False
    """Whether `decoding.step` can run its layers: RMSNorm before attention and before the MLP and nowhere else (but for
    heads), rotary embedding of whole heads, and nothing scaled but the scores."""
    reads_again_past: str | None = None
    """Config entry with the length past which transformers' `generate` drops the cache, once, and reads the text again,
    for rotary factors that are others from there on; None: it never does."""
    served: str = "all"
    """What of it vLLM can run sparse: "all", the "layers" alone, where vLLM has no head of its own, or nothing ("")."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(fused_step=True),
    "mistral": Architecture(fused_step=True),
    "qwen2": Architecture(fused_step=True),
    "qwen3": Architecture(fused_step=True),
    "gemma2": Architecture(activation="hidden_activation", served="layers"),
    "gemma3_text": Architecture(activation="hidden_activation"),
    "gemma3": Architecture(layers="model.language_model.layers", activation="hidden_activation"),
    "phi3": Architecture(
        gate="gate_up_proj",
        up="gate_up_proj",
        q="qkv_proj",
        k="qkv_proj",
        v="qkv_proj",
        reads_again_past="original_max_position_embeddings",
    ),
    "olmo2": Architecture(served=""),
    "granite": Architecture(),
}


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""Activation names of Hugging Face configs -> those of `ops.sparse_mlp`."""


def family(config: Any) -> Architecture:
    """The row of a model's family.

    Args:
        config: the model's, or the content of its config.json.

    Raises:
        UnsupportedModel: there is none; the message says whether one would do.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    data = config if isinstance(config, dict) else config.to_dict() if hasattr(config, "to_dict") else {}
    raise UnsupportedModel(
        f"model_type {model_type!r} is not supported. Known: {', '.join(sorted(ARCHITECTURES))}. "
        f"{_what_to_do(model_type, data)}"
    )


def activation(name: str) -> str:
    """The name in `ops.sparse_mlp` of an activation of Hugging Face's.

    Raises:
        UnsupportedModel: unknown.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"activation {name!r} is not known. Known: {', '.join(ACTIVATIONS)}. To add it, write its formula in "
            "ops/activations.py and the kernels', and its name in ACTIVATIONS of sandcat/models/families.py."
        )
    return ACTIVATIONS[name]


def check_config(data: dict[str, Any]) -> None:
    """Whether models of such a config.json can be made sparse, as far as that can be seen from it.

    Raises:
        UnsupportedModel: they cannot.
    """
    row, text = family(data), data.get("text_config")
    name = (text if isinstance(text, dict) else data).get(row.activation)
    if name is not None:
        activation(name)


def _what_to_do(model_type: str | None, data: dict[str, Any]) -> str:
    """Where there is no row: add one, or take another model."""
    if model_type is None:
        return "A config names its model_type."
    data = _completed(model_type, data)
    if _has_experts(data):
        return (
            "It is a mixture of experts, of which each token uses a few MLPs: those are not supported, and a row would "
            "not do. Take a dense model."
        )
    if data.get("is_encoder_decoder"):
        return "It is an encoder with a decoder, and only decoders alone are supported."
    return (
        f"If it has a gated MLP, act(gate(x)) * up(x) -> down, in each layer, add the row {model_type!r}: "
        "Architecture(...) to ARCHITECTURES in sandcat/models/families.py (docs/extending.md)."
    )


def _completed(model_type: str, data: dict[str, Any]) -> dict[str, Any]:
    """With the defaults that a config.json may leave out, where the family is one of transformers'."""
    from transformers import CONFIG_MAPPING  # here, as only an error needs it

    try:
        return {**CONFIG_MAPPING[model_type]().to_dict(), **data}
    except Exception:  # no such family, or one without defaults
        return data


def _has_experts(data: dict[str, Any]) -> bool:
    inner = [value for value in data.values() if isinstance(value, dict)]
    named = [(str(key), value) for key, value in data.items() if type(value) is int]
    counts = [value for key, value in named if "expert" in key or "moe_num" in key]
    return max(counts, default=0) > 1 or any(map(_has_experts, inner))
