"""Runs the fused step on the CPU by Triton's interpreter and compares it with the step of transformers.

python tests/ops/interpret_step.py float|int8|deterministic|batch

A program of its own, for the same reason as interpret_triton.py.
"""

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.models.view import ModelView
from sandcat.ops import FORMATS, pays
from sandcat.ops.triton.primitives import launch

everywhere = itertools.product(pays._ALL, ["cpu"], pays._FLOATS, FORMATS)
pays._MOST_TOKENS = dict.fromkeys(everywhere, (16, 16))  # several sequences skip, too
launch.multiprocessors = lambda device: 2
launch.shared_memory = lambda device: 200000
launch.dependent_launch = lambda device: {"PDL": False}

from sandcat.decoding.fused_gpu import GpuStep  # noqa: E402
from sandcat.decoding.fused_gpu_batch import GpuBatchStep  # noqa: E402  # whose kernels ask for these as they are imported


def fused(model, cache):
    view = ModelView(model)
    kind = GpuStep if len(cache.layers[0].keys) == 1 else GpuBatchStep
    step = kind(view, list(view.blocks()), cache)
    step.position.fill_(20)
    return step


def logits(model, ids):
    """Of four steps after 20 tokens, and the decoder."""
    decoder = Decoder(model, 24, compile=None, batch=len(ids))
    decoder.prefill(ids[:, :20])
    return [decoder.step(ids[:, i : i + 1]) for i in range(20, 24)], decoder


RECIPES = {
    "float": [
        *(("llama", r) for r in (None, "cats:layers=1:", "teal", "teal:sites=[k,up,down],layers=:1")),
        ("llama", "teal:sites=[q,k,v,o,gate] cats"), ("mistral", None), ("mistral", "teal:sites=[o,gate]"),
        ("qwen2", "cats"), ("qwen2", "teal"), ("qwen3", None), ("qwen3", "teal:sites=[q,k,v,o,gate] cats"),
        ("llama", "teal:sites=all+head"),
    ],
    "int8": [
        *(("llama", f"int8{rest}") for rest in ("", " teal", " cats", " teal:sites=[q,k,v,o,gate] cats")),
        ("llama", "int8:sites=[k,gate,o] teal:sites=[q,down,head]"), ("llama", "int8:sites=[down,head],layers=1: cats"),
        ("qwen2", "int8:sites=[q,k,v,up] cats"), ("qwen2", "int8 teal:sites=all+head"),
        ("llama", "fp8"), ("llama", "fp8:sites=[q,gate,down] int8:sites=[k,up,o] teal"), ("llama", "fp8 cats"),
    ],
    "deterministic": [("llama", "cats"), ("llama", "int8 teal:sites=[q,k,v,o,gate] cats")],
    "batch": [
        ("llama", None), ("llama", "teal"), ("llama", "teal:batch=shared"), ("llama", "int8"), ("qwen2", "int8 teal"),
        ("llama", "teal:sites=[q,k,v,o,gate],batch=shared cats:batch=shared"), ("mistral", "cats"), ("qwen3", "teal"),
        ("llama", "int8:sites=[k,gate,o] teal:sites=[q,down,head]"), ("qwen2", "int8 teal:sites=all+head,batch=shared"),
        ("llama", "int8 cats"), ("llama", "int8:sites=[q,up] teal:batch=shared"), ("llama", "fp8"),
        ("qwen2", "fp8 teal"),
    ],
}  # fmt: skip


def check(family, recipe, sequences, **sizes):
    options = {"mlp_bias": False} if family == "llama" else {}
    window = {"sliding_window": 4} if family == "mistral" else {}
    model = tiny(family, tie_word_embeddings="int8" in (recipe or ""), **options, **window, **sizes)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    ids = torch.randint(4, VOCABULARY, (sequences, 24))
    want, decoder = logits(model, ids)
    cached = [(layer.keys.clone(), layer.values.clone()) for layer in decoder.cache.layers]
    for layer in decoder.cache.layers:
        layer.keys[:, :, 20:], layer.values[:, :, 20:] = float("nan"), float("nan")
    step = fused(model, decoder.cache)
    for i, expected in enumerate(want):
        torch.testing.assert_close(step(ids[:, 20 + i : 21 + i]), expected, rtol=1e-4, atol=1e-5)
    assert step.position == 24
    for (keys, values), layer in zip(cached, decoder.cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.values, values, rtol=1e-4, atol=1e-5)


def check_rounding(recipe):
    """In float16, over all steps: of a single one the roundings differ by more."""
    model = tiny("llama", torch.float16, mlp_bias=False)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    torch.manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (1, 24))
    want, decoder = logits(model, ids)
    step = fused(model, decoder.cache)
    found = [step(ids[:, i : i + 1]).clone() for i in range(20, 24)]
    exact, _ = logits(model.float(), ids)
    ours, theirs = ((torch.stack(logits) - torch.stack(exact)).norm() for logits in (found, want))
    assert ours <= 1.5 * theirs, (ours, theirs)


with torch.inference_mode():
    kind = sys.argv[1]
    torch.use_deterministic_algorithms(kind == "deterministic")
    sequences = 3 if kind == "batch" else 1
    for family, recipe in RECIPES[kind]:
        print(family, recipe, flush=True)
        check(family, recipe, sequences)
    recipe = {"int8": "int8", "batch": "int8 teal:batch=shared"}.get(kind)
    check("llama", recipe, sequences, hidden_size=320)  # more than one slice of the columns
    check_rounding("int8" if kind == "int8" else None)
print(f"{len(RECIPES[kind]) + 2} steps equal those of transformers")
