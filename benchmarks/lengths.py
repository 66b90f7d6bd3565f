"""A whole fused decode step of sequences whose lengths differ by 10, beside that of sequences of one length with as
many tokens in all, at the shapes of real models with random weights.

    python benchmarks/lengths.py                  # Llama-3-8B; 32,768 tokens in all on a GPU, 8,192 on a CPU
    python benchmarks/lengths.py --shapes llama-3.2-1b --batch 4,8,16 --recipe int8

What is cached is random numbers, in the pages that the step reads. Before anything is timed, the first layer of the
model with the head is compared with that of transformers, after prompts of such lengths, a sixteenth of them. Runs of a
few steps are interleaved, and medians count; "over equal" is over the step of one length.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from step import SHAPES, random_model
from torch import nn

import sandcat
from sandcat.data import Text
from sandcat.decoding.decoder import Decoder
from sandcat.errors import ParityError
from sandcat.measuring.bytes_read import read_bytes
from sandcat.measuring.speed import read_bandwidth
from sandcat.measuring.step_parity import LAYER_TOLERANCE, error_of
from sandcat.models.view import ModelView
from sandcat.support.devices import pick_device, pick_dtype

TIMES = 10
"""How much longer the longest sequence is than the others."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--recipe", help="of the model that is timed; default: dense")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, help="of all sequences; default 32768, on a CPU 8192")
    parser.add_argument("--batch", default="4,8")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    tokens = options.tokens or (32768 if device.type == "cuda" else 8192)
    torch.manual_seed(0)
    model = random_model(options.shapes, device, dtype)
    if options.recipe:
        text = Text(torch.randint(0, model.config.vocab_size, (16, 256)), "random tokens", "")
        sandcat.sparsify(model, None, options.recipe, calibration=text)
    bandwidth = read_bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {options.shapes}, {dtype}, {tokens} tokens, ", end="")
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s\n")
    print("| sequences | lengths | ms | GB | of read | over equal |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in map(int, options.batch.split(",")):
        check(model, of_all(tokens // 16, batch)["longest last"])
        decoders = {which: filled(model, lengths, options.steps) for which, lengths in of_all(tokens, batch).items()}
        times = medians(decoders, options.steps, options.runs)
        for which, seconds in times.items():
            moved = read_bytes(model) + decoders[which].cache.bytes_read()
            print(
                f"| {batch} | {which} | {seconds * 1e3:.3f} | {moved / 1e9:.2f} | {moved / seconds / bandwidth:.0%} | "
                f"{seconds / times['equal']:.3f}x |",
                flush=True,
            )


def of_all(tokens: int, batch: int) -> dict[str, list[int]]:
    """Lengths of so many sequences that have so many tokens in all."""
    short = tokens // (batch - 1 + TIMES)
    unequal = [tokens - short * (batch - 1)] + [short] * (batch - 1)
    return {"equal": [tokens // batch] * batch, "longest first": unequal, "longest last": unequal[::-1]}


def filled(model: nn.Module, lengths: list[int], steps: int) -> Decoder:
    """A decoder that has so many random keys and values of each sequence, and room for some steps."""
    longest, config = max(lengths), model.config
    decoder = Decoder(model, longest + steps, batch=len(lengths))
    decoder.cache.begin([longest - length for length in lengths])
    shape = (len(lengths), config.num_key_value_heads, longest, config.head_dim)
    for layer in decoder.cache.layers:
        layer.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)))
    decoder.rewind(longest)
    return decoder


def medians(decoders: dict[str, Decoder], steps: int, runs: int) -> dict[str, float]:
    """Median seconds of a step of each, over interleaved runs; the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(runs + 1):
        for name, decoder in decoders.items():
            device, ids_B1 = decoder.model.device, torch.full((decoder.batch, 1), 5, device=decoder.model.device)
            wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
            wait()
            start = time.perf_counter()
            for _ in range(steps):
                decoder.step(ids_B1)
            wait()
            seconds[name].append((time.perf_counter() - start) / steps)
            assert decoder.fused is not None
            decoder.rewind(decoder.max_length - steps)
    return {name: statistics.median(taken[1:]) for name, taken in seconds.items()}


def check(model: nn.Module, lengths: list[int]) -> None:
    """
    Raises:
        ParityError: the first layer and the head are not those of transformers, after prompts of such lengths.
    """
    longest, device = max(lengths), model.device
    ids_BT = torch.randint(0, model.config.vocab_size, (len(lengths), longest + 1), device=device)
    mask_BT = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    found = []
    with ModelView(model).only(slice(0, 1)):
        for mode in (None, "fused"):
            decoder = Decoder(model, longest + 1, batch=len(lengths), compile=mode)
            decoder.prefill(ids_BT[:, :-1], mask_BT)
            found.append(decoder.step(ids_BT[:, -1:]).clone())
    errors = [error_of(mine, other) for other, mine in zip(*found, strict=True)]
    if decoder.fused is None or not max(errors) <= LAYER_TOLERANCE[model.dtype]:
        raise ParityError(f"the step after prompts of {lengths} tokens is wrong: relative errors {errors}.")


if __name__ == "__main__":
    main()
