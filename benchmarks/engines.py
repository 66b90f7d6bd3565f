"""llama.cpp or OpenVINO in a process of its own, for decode.py: beside PyTorch in one process llama.cpp crashes.

    python benchmarks/engines.py llama.cpp FILE.gguf THREADS    # or: openvino FOLDER THREADS

Reads lines of JSON, {"prompt": [tokens], "ids": [tokens]}; answers each with {"seconds": a token, "likeliest": [...]}.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Reader = Callable[[list[int], int], int]
"""Reads tokens after so many that were read before (0: from the start), and gives the likeliest next one."""


def llama(file: Path, threads: int, most: int = 2048) -> Reader:
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=most, n_threads=threads, n_threads_batch=threads, verbose=False)

    def read(tokens: list[int], length: int) -> int:
        model.n_tokens = length
        model.eval(tokens)
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),)).argmax())

    return read


def openvino(folder: Path, threads: int) -> Reader:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings).create_infer_request()

    def read(tokens: list[int], length: int) -> int:
        if length == 0:
            request.reset_state()
        given = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, length + len(tokens)), np.int64),
            "position_ids": np.arange(length, length + len(tokens))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return int(request.infer(given, share_inputs=True, share_outputs=True)["logits"][0, -1].argmax())

    return read


def main(engine: str, place: str, threads: str) -> None:
    read = {"llama.cpp": llama, "openvino": openvino}[engine](Path(place), int(threads))
    for line in sys.stdin:
        asked = json.loads(line)
        prompt, ids = asked["prompt"], asked["ids"]
        read(prompt, 0)
        start = time.perf_counter()
        likeliest = [read([token], len(prompt) + i) for i, token in enumerate(ids)]
        seconds = (time.perf_counter() - start) / len(ids)
        print(json.dumps({"seconds": seconds, "likeliest": likeliest}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
