"""Run by test_vllm.py in a process of its own: what vLLM writes on some prompts (token ids), as JSON in a file.

python vllm_answers.py FOLDER PROMPTS.json ANSWERS.json '{"options": "of vllm.LLM"}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

NEW_TOKENS = 16


def main(folder: str, prompts: str, answers: str, options: str) -> None:
    options = json.loads(options)
    cores = "0|1" if options.get("tensor_parallel_size", 1) == 2 else "0-1"
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND=cores, HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    llm = LLM(folder, **{"enforce_eager": True, "max_model_len": 128} | options)
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=0, ignore_eos=True)
    found = []
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    for request in llm.generate(asked, greedy):
        (output,) = request.outputs
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        found.append({"ids": list(output.token_ids), "logprobs": logprobs})
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
