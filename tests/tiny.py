"""Small random models of every family, and a tokenizer, made from configs: nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sandcat.models.families import ARCHITECTURES

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
EXTRA = {
    "llama": {"mlp_bias": True},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 16},
}
FAMILIES = sorted(ARCHITECTURES)


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes) -> torch.nn.Module:
    """A random model whose weights are large enough that its logits depend on every part of it."""
    sizes = {**SIZES, **EXTRA.get(family, {}), **changes}
    if family == "gemma3":
        text = {**sizes, **EXTRA["gemma3_text"]}
        config = AutoConfig.for_model(family, text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    else:
        config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for code in range(VOCABULARY - len(vocabulary)):
        vocabulary[chr(32 + code)] = len(vocabulary)
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def text(tokens: int = 1024, window: int = 64, seed: int = 5):
    """Random token ids to calibrate on."""
    from sandcat.data import Text

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (tokens // window, window), generator=generator)
    return Text(ids, f"random ids (seed {seed})", "0" * 64)
