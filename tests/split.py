"""What each of several processes runs in tests/test_tensor_parallel.py: python split.py FOLDER... loads models in parts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny import VOCABULARY
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from sandcat.errors import SandcatError

IDS = torch.randint(4, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def outputs(model) -> list[torch.Tensor]:
    """Logits of prompts and of a step, and what it writes."""
    out = model(IDS[:1])
    step = model(IDS[:1, :1], past_key_values=out.past_key_values)
    written = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
    return [model(IDS).logits, out.logits, step.logits, written]


def held(model) -> int:
    """Bytes of its weights in this process."""
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main(folders: list[str]) -> None:
    for folder in folders:
        try:
            config = DistributedConfig(tp_size=2)
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()
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
