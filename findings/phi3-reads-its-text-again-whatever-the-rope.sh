#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: `generate` of a phi3 drops its whole cache once the text has one token more than
# original_max_position_embeddings, and reads everything again in one forward, also where the rope type is "default":
# no factors change there, so the cache that it drops is right.
# A good guess: a cache is dropped only for ropes with long and short factors, and a step reads one token.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import Phi3Config, Phi3ForCausalLM

torch.manual_seed(0)
config = Phi3Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=32, pad_token_id=0,
    bos_token_id=None, eos_token_id=None,
)
model = Phi3ForCausalLM(config).eval()
print("rope type:", config.rope_parameters["rope_type"])
read = []
model.model.embed_tokens.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
model.generate(torch.arange(30)[None] + 1, max_new_tokens=6, do_sample=False)
print("tokens that each forward reads:", read)
assert config.rope_parameters["rope_type"] == "default" and read == [30, 1, 1, 33, 1, 1], read
PY
# Seen:
# rope type: default
# tokens that each forward reads: [30, 1, 1, 33, 1, 1]
