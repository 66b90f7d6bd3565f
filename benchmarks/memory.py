"""Peak memory of a process that loads a model and runs it: dense beside sparse, each in a fresh process.

    python benchmarks/memory.py                             # a random llama of 127 million parameters
    python benchmarks/memory.py --dtype bfloat16 --recipe int8 --recipe "teal:sites=all+head"
    python benchmarks/memory.py --model smollm2-135m

Each process loads its folder, reads a prompt, with the logits of all its tokens, and takes decode steps. The peak is of
all that lies in memory for it, pages of mapped files counted (VmHWM; where there is no /proc, ru_maxrss).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich import print
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import sandcat
from sandcat.data import Text
from sandcat.decoding.decoder import Decoder

RECIPES = ["cats", "teal", "teal:sites=all+head", "int8", "int8 teal"]
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: a random llama")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=NUMBER", help="of the random llama")
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(peaks(options.folder, options.tokens)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, folder in made(options, Path(place)):
            command = [sys.executable, __file__, "--folder", str(folder), "--tokens"]
            subprocess.run([*command, "8"], capture_output=True, check=True)  # compiles kernels, which takes memory too
            run = subprocess.run([*command, str(options.tokens)], capture_output=True, text=True, check=True)
            rows.append({"recipe": name, **json.loads(run.stdout)})
    if options.json:
        print(json.dumps(rows))
        return
    dense = rows[0]
    print(f"{options.model or 'random llama'}, {options.dtype}, a prompt of {options.tokens} tokens; MB")
    print("| recipe | weights | imports | + loading | + prompt | + steps: peak | of dense |\n|" + " --- |" * 7)
    for row in rows:
        figures = [row[key] / 1e6 for key in ("weights", "imports", "loading", "prompt", "steps")]
        print(f"| {row['recipe']} |", *(f"{f:.0f} |" for f in figures), f"{row['steps'] / dense['steps']:.3f}x |")


def made(options, place: Path):
    """The folder of the dense model, and one for each recipe."""
    if options.model:
        dense, tokenizer = sandcat.load(options.model, device="cpu", dtype=options.dtype)
    else:
        config = AutoConfig.for_model("llama", **SIZES | {k: int(v) for k, v in (s.split("=") for s in options.size)})
        torch.manual_seed(0)
        dense = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, "<s>")), bos_token="<s>"
        )
    ids_NL = torch.randint(0, dense.config.vocab_size, (2, 256), generator=torch.Generator().manual_seed(0))
    yield "dense", sandcat.save(dense, tokenizer, place / "dense")
    for number, recipe in enumerate(options.recipe or RECIPES):
        sparse = copy.deepcopy(dense)
        sandcat.sparsify(sparse, tokenizer, recipe, calibration=Text(ids_NL, "random tokens", ""))
        yield recipe, sandcat.save(sparse, tokenizer, place / str(number))


def peak() -> int:
    """Bytes of the process so far, at most. (`ru_maxrss` of Linux starts at that of the parent process.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def peaks(folder: str, tokens: int) -> dict[str, int]:
    found = {"imports": peak()}
    model, _ = sandcat.load(folder, device="cpu")
    found["weights"] = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    found["loading"] = peak()
    ids_BT = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    model(ids_BT, use_cache=False)
    gc.collect()
    found["prompt"] = peak()
    decoder = Decoder(model, tokens + STEPS)
    decoder.prefill(ids_BT)
    for step in range(STEPS):
        decoder.step(ids_BT[:, step : step + 1])
    return {**found, "steps": peak()}


if __name__ == "__main__":
    main()
