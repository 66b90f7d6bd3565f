"""One whole decode step, dense against sparse, at the shapes of a real model with random weights.

    python benchmarks/step.py                       # Llama-2-7B shapes, CATS 50 %, after 500 tokens
    python benchmarks/step.py --shapes llama-3.2-1b --recipe cats:sparsity=0.7

Thresholds are calibrated on random tokens, so the share of neurons dropped is the target's. Both run the same loop:
static cache, torch.compile (max-autotune on a GPU), and on a GPU one CUDA graph. The kernel is checked against its
reference first; times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import copy

import torch
from rich import print
from transformers import AutoConfig, AutoModelForCausalLM

import sandcat
from sandcat.benchmark import benchmark
from sandcat.data import Text
from sandcat.hub import pick_device, pick_dtype
from sandcat.layers.sparse import sparse_modules

SHAPES = {
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32000),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256),
    "tiny": ("llama", 256, 704, 4, 4, 2, 1000),
}
"""Family, hidden and intermediate size, layers, heads, key-value heads, vocabulary."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--recipe", default="cats:sparsity=0.5")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    family, hidden, neurons, layers, heads, groups, vocabulary = SHAPES[options.shapes]
    config = AutoConfig.for_model(
        family, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=hidden // heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    sparse = copy.deepcopy(dense)
    ids_NL = torch.randint(0, vocabulary, (16, 256))
    sandcat.sparsify(sparse, None, options.recipe, calibration=Text(ids_NL, "random tokens", ""))
    ids_BT = torch.randint(0, vocabulary, (1, options.context + options.steps))
    found = benchmark(dense, sparse, ids_BT, steps=options.steps, runs=options.runs, compile=not options.no_compile)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, {options.shapes} shapes, {dtype}, {options.recipe}, kernel {found.kernel}"
    )
    print(f"{len(sparse_modules(sparse))} sparse MLPs; parity error at most {found.parity_error:.1e}")
    print("| step | ms | GB | GB/s | of read |\n| --- | --- | --- | --- | --- |")
    for variant, seconds in found.variants.items():
        read = found.dense_bytes if variant.startswith("dense") else found.sparse_bytes
        print(
            f"| {variant} | {seconds * 1e3:.3f} | {read / 1e9:.2f} | {read / seconds / 1e9:.0f} | "
            f"{read / seconds / found.read_bandwidth:.0%} |"
        )
    print(f"\ngain {found.gain:.2f}x; the bytes allow {found.allowed_gain:.2f}x")


if __name__ == "__main__":
    main()
