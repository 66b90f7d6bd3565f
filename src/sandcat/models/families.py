"""The model families: one row of data each.

This is the only file that knows the module names of Hugging Face models. To support another family, add one row to
`ARCHITECTURES`; the contract tests pick it up (tests/tiny.py builds a small random model of every row).
"""

from __future__ import annotations

from dataclasses import dataclass


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
