"""A whole decode step, dense against cheaper ones, at the shapes of real models with random weights: one table.

    python benchmarks/step.py                         # Llama-2-7B and Mistral-7B shapes, four recipes, 500 tokens
    python benchmarks/step.py --shapes llama-3.2-1b --recipe cats:sparsity=0.7 --recipe "int8 teal:sparsity=0.5"
    python benchmarks/step.py --shapes llama-2-7b --batch 2,4,8,16 --no-compile --recipe teal:sparsity=0.5,batch=shared

Thresholds are calibrated on random tokens, so the shares dropped are the recipes'. All steps run in the same loop, over
a static cache, on a GPU as one CUDA graph; `fused` are those of `sandcat.decoding.step`, `compiled` of torch.compile
(max-autotune on a GPU). The dense ones are prepared once, and timed again, in turn, with those of every recipe. Where a
recipe is teal alone, for one sequence, with a dense head, a GPU also runs it in TEAL's published way
(teal_published.py). Kernels and steps are compared with references and eager steps before anything is timed; times are
medians. "Gain" is over what PyTorch makes of the dense model: the faster of its eager and compiled steps in that loop.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import sandcat
from sandcat.data import Text
from sandcat.decoding.decoder import Decoder
from sandcat.errors import ParityError
from sandcat.measuring.bytes_read import step_bytes
from sandcat.measuring.parity import parity_error
from sandcat.measuring.speed import prepared_steps, read_bandwidth, step_medians, step_modes
from sandcat.support.devices import pick_device, pick_dtype

SHAPES = {
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 32000),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32000),
    "llama-3-8b": ("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 128256),
    "tiny": ("llama", 256, 704, 4, 4, 2, 1000),
}
"""Family, hidden and intermediate size, layers, heads, key-value heads, vocabulary."""
RECIPES = ["cats:sparsity=0.5", "teal:sparsity=0.5", "int8 teal:sparsity=0.5", "int8"]
PUBLISHED_TOLERANCE = 0.1
"""Relative RMS error allowed to a layer in TEAL's published way, whose atomics add up in the model's dtype."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-2-7b,mistral-7b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--recipe", action="append", help=f"again for more; default {', '.join(RECIPES)}")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--batch", default="1", help="sequences, or several numbers of them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled steps, which take minutes")
    options = parser.parse_args()
    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    bandwidth = read_bandwidth(device)
    print(f"{name}, torch {torch.__version__}, {dtype}, {options.context} tokens before, read bandwidth ", end="")
    print(f"{bandwidth / 1e9:.0f} GB/s\n")
    print("| shapes | batch | recipe | step | ms | GB | GB/s | of read | dense ms | gain | bytes allow |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shapes in options.shapes.split(","):
        compare(shapes, options.recipe or RECIPES, device, dtype, bandwidth, options)
        torch._dynamo.reset()  # it holds on to the models


def compare(shapes: str, recipes: list[str], device: torch.device, dtype: torch.dtype, bandwidth: float, options):
    """Prints the rows of one model."""
    torch.manual_seed(0)
    dense = random_model(shapes, device, dtype)
    vocabulary = dense.config.vocab_size
    text = Text(torch.randint(0, vocabulary, (16, 256)), "random tokens", "")
    modes = step_modes(device, not options.no_compile)
    prompts, dense_steps, dense_bytes = {}, {}, {}
    for batch in map(int, options.batch.split(",")):
        prompts[batch] = ids_BT = torch.randint(0, vocabulary, (batch, options.context + options.steps))
        dense_steps[batch] = prepared_steps("dense", dense, ids_BT, options.steps, modes)
        dense_bytes[batch] = step_bytes(dense, ids_BT)
    for recipe in recipes:
        model = copy.deepcopy(dense)
        sandcat.sparsify(model, None, recipe, calibration=text)
        for batch, ids_BT in prompts.items():
            rows(shapes, recipe, model, ids_BT, dense_steps[batch], dense_bytes[batch], modes, bandwidth, options,
                 show_dense=recipe == recipes[0])  # fmt: skip


def rows(
    shapes: str, recipe: str, model: nn.Module, ids_BT, dense_steps: dict[str, Decoder], dense_bytes: int, modes,
    bandwidth: float, options, *, show_dense: bool,
) -> None:  # fmt: skip
    """Prints the rows of one recipe at one batch."""
    parity_error(model, ids_BT)
    steps = prepared_steps(recipe, model, ids_BT, options.steps, modes, compile_fused=False)
    alone = len(ids_BT) == 1 and recipe.startswith("teal") and " " not in recipe and "head" not in recipe
    if model.device.type == "cuda" and "compiled" in modes and alone:
        steps |= published_steps(recipe, model, ids_BT, options.steps, modes)
    times = step_medians(dense_steps | steps, ids_BT, options.steps, options.runs)
    baseline = min(t for name, t in times.items() if name in ("dense eager", "dense compiled"))
    read = step_bytes(model, ids_BT)
    for name, seconds in times.items():
        is_dense = name in dense_steps
        if is_dense and not show_dense:
            continue
        moved, (which, _, variant) = dense_bytes if is_dense else read, name.rpartition(" ")
        print(
            f"| {shapes} | {len(ids_BT)} | {which} | {variant} | {seconds * 1e3:.3f} | {moved / 1e9:.2f} | "
            f"{moved / seconds / 1e9:.0f} | {moved / seconds / bandwidth:.0%} | {baseline * 1e3:.3f} | "
            f"{baseline / seconds:.2f}x | {dense_bytes / moved:.2f}x |",
            flush=True,
        )


def random_model(shapes: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    family, hidden, neurons, layers, heads, groups, vocabulary = SHAPES[shapes]
    config = AutoConfig.for_model(
        family, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=hidden // heads, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    return model.requires_grad_(False)


def published_steps(recipe: str, model: nn.Module, ids_BT, steps: int, modes) -> dict[str, Decoder]:
    """The step of a teal model in TEAL's published way.

    Raises:
        ParityError: its kernel or its step is not right.
    """
    import teal_published  # here, as not every machine has Triton

    published = teal_published.as_published(model)
    error = teal_published.error_of_kernel(published)
    if not error < PUBLISHED_TOLERANCE:
        raise ParityError(f"TEAL's published way is wrong here: relative error {error:.1e} of a layer.")
    name = f"{recipe}, TEAL's published way,"
    decoders = prepared_steps(name, published, ids_BT, steps, {k: v for k, v in modes.items() if k != "fused"})
    return {f"{name} compiled": decoders[f"{name} compiled"]}


if __name__ == "__main__":
    main()
