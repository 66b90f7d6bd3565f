"""A sparse model split over devices beside the whole one: logits, bytes held by a device, time of a decode step.

    torchrun --nproc_per_node 2 benchmarks/tensor_parallel.py FOLDER

FOLDER is what sandcat sparsify wrote. Each process takes a GPU (without any: CPU cores, to try it). The first one then
runs the whole model as well, if it fits its device. Another order of sums decides on which side of a threshold a value
lies, which grows in a deep model of random weights: its logits may differ by much.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import StaticCache

import sandcat


def held(model: torch.nn.Module) -> int:
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@torch.inference_mode()
def measured(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
    """Logits of the prompt, and the median time of a decode step after it, in milliseconds."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + steps)
    logits, times = model(ids, past_key_values=cache).logits, []
    for _ in range(steps):
        start = time.perf_counter()
        model(ids[:, :1], past_key_values=cache)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return logits.float().cpu(), sorted(times)[steps // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default=None, help="default: the folder's")
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parts = dist.get_world_size()
    model, _ = sandcat.load(options.folder, dtype=options.dtype, tensor_parallel=parts)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(options.context).mul(7919).remainder(vocabulary)[None].to(model.device)
    logits, milliseconds = measured(model, ids, options.steps)
    size = held(model)
    if dist.get_rank() == 0:
        print(f"{parts} devices: {size / 1e6:.0f} MB each, {milliseconds:.2f} ms a step (eager)")
        whole, _ = sandcat.load(options.folder, dtype=options.dtype, device=str(model.device))
        want, milliseconds = measured(whole, ids, options.steps)
        print(f"1 device: {held(whole) / 1e6:.0f} MB, {milliseconds:.2f} ms a step (eager)")
        print(f"logits: relative RMS difference {float((logits - want).norm() / want.norm()):.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
