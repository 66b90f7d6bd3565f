"""A tiny model made sparse and decoded on whatever processor runs this, as one that QEMU emulates: prints the path that
its kernels take, whether a fused step applies, and how far its logits are from those of the model's own forward.

    qemu-x86_64 -cpu Haswell .venv/bin/python tests/ops/emulated.py
"""

import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.ops.numba.primitives import processor

print(platform.machine(), torch.__version__, processor.path(), flush=True)
model = tiny("llama", mlp_bias=False, num_hidden_layers=1)
plan = sandcat.sparsify(model, None, "teal", calibration=text())
print(plan.recipe, "at", len(plan.steps[0].sites), "sites", flush=True)
ids, logits = torch.randint(4, VOCABULARY, (1, 12)), []
with torch.inference_mode():
    for options in ({}, {"compile": None}):
        decoder = Decoder(model, 12, **options)
        decoder.prefill(ids[:, :10])
        logits.append(decoder.step(ids[:, 10:11]))
        print("fused step" if decoder.fused else "the model's forward", flush=True)
error = float((logits[0] - logits[1]).norm() / logits[1].norm())
print("relative error", error)
assert error < 1e-5
