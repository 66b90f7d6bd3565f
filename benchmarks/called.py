"""What it costs the fused step on a CPU that a module stands between its kernels: how long the program is interrupted.

A model whose MLPs are modules that do nothing, each called between two records, beside the same model without MLPs, in
turns: the difference, over the number of layers.

Usage: python benchmarks/called.py [--hidden 512] [--layers 16] [--dtype bfloat16] [--steps 1000]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sandcat.decoding import fused_cpu
from sandcat.decoding.decoder import Decoder
from sandcat.measuring.machine import machine


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def decoder(hidden: int, layers: int, dtype: torch.dtype, length: int) -> Decoder:
    config = AutoConfig.for_model(
        "llama", vocab_size=1000, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for layer in model.model.layers:
        layer.mlp = Nothing()
    made = Decoder(model, length)
    made.prefill(torch.arange(8)[None])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    options = given.hidden, given.layers, getattr(torch, given.dtype), given.steps + 20
    called, whole = decoder(*options), decoder(*options)
    called.step(torch.tensor([[9]]))
    parts_of_all = fused_cpu.model_parts
    fused_cpu.model_parts = lambda view, cache: _without_mlps(parts_of_all(view, cache))
    whole.step(torch.tensor([[9]]))
    assert len(called.fused.runs) == given.layers + 1 and len(whole.fused.runs) == 1
    seconds: dict[Decoder, list[float]] = {called: [], whole: []}
    for step in range(given.steps):
        for one in seconds:
            start = time.perf_counter()
            one.step(torch.tensor([[step % 1000]]))
            seconds[one].append(time.perf_counter() - start)
    slow, fast = (statistics.median(found) * 1e6 for found in seconds.values())
    more = statistics.median(a - b for a, b in zip(*seconds.values(), strict=True)) * 1e6
    print(f"{machine('cpu')['cpu']}, {torch.get_num_threads()} threads, {given.dtype}, {given.layers} layers of "
          f"{given.hidden}: {slow:.0f} us with a module in each, {fast:.0f} us without, "
          f"{more / given.layers:.1f} us for each interruption")  # fmt: skip


def _without_mlps(parts):
    return parts._replace(layers=[layer[:1] for layer in parts.layers])


if __name__ == "__main__":
    main()
