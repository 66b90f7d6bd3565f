"""What each of several processes runs in tests/checkpoints/test_tensor_parallel.py: split.py DEVICE FOLDER..."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny import VOCABULARY
from torch import distributed as dist
from torch.distributed.tensor import DTensor

import sandcat
from sandcat.errors import SandcatError

IDS = torch.randint(4, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def outputs(model) -> list[torch.Tensor]:
    """Logits of prompts and of a step, and what it writes."""
    ids = IDS.to(model.device)
    out = model(ids[:1])
    step = model(ids[:1, :1], past_key_values=out.past_key_values)
    written = model.generate(ids[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
    return [found.cpu() for found in (model(ids).logits, out.logits, step.logits, written)]


def held(model) -> int:
    """Bytes of its weights here, without an embedding table of its own, which not all versions of transformers split.

    (On a CPU a part is a view into the mapped file, whose rest nobody reads.)
    """
    table = model.get_input_embeddings().weight
    tensors = [*model.parameters(), *model.buffers()]
    if model.get_output_embeddings().weight is not table:
        tensors = [t for t in tensors if t is not table]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.data_ptr(): t.nbytes for t in local}.values())


def main(folders: list[str]) -> None:
    for folder in folders:
        try:
            model, _ = sandcat.load(folder, tensor_parallel=2)
            found = {"outputs": outputs(model), "bytes": held(model)}
            try:
                model.save_pretrained(Path(folder) / "again")
            except SandcatError as error:
                found["saving"] = str(error)
        except SandcatError as error:
            found = {"error": str(error)}
        torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
