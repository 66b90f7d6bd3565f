#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: a model with dynamic rotary scaling gives a text of exactly max_position_embeddings
# tokens other logits after it has read a longer text than before, though both calls are without a cache. A text of one
# token fewer is reset to its own factors, and gives what it gave. (The reset asks for a text shorter than the original
# length, growing for one longer than the longest so far; a text of just that length is neither.)
# A good guess: each forward without a cache depends on its tokens alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, rope_parameters=rope,
)
model = LlamaForCausalLM(config).eval()


def logits(length):
    with torch.no_grad():
        return model(torch.arange(length)[None] % 64, use_cache=False).logits


just, fewer = logits(32), logits(31)
logits(64)
just_again = logits(32)
logits(64)
fewer_again = logits(31)
print("32 tokens, after a text of 64:", "equal" if torch.equal(just, just_again) else "other logits")
print("31 tokens, after a text of 64:", "equal" if torch.equal(fewer, fewer_again) else "other logits")
assert not torch.equal(just, just_again) and torch.equal(fewer, fewer_again)
PY
# Seen:
# 32 tokens, after a text of 64: other logits
# 31 tokens, after a text of 64: equal
