"""Decode steps of 1 to 16 sequences, layer by layer: dense, and what a sparse layer can do instead. What the limits of
`sandcat.ops.most_tokens` are read from. Last come the largest batches up to which each kernel beats the dense layer.

    python benchmarks/batch.py       # on a GPU bfloat16 and Mistral-7B shapes; on a CPU float32, bfloat16, smaller ones
    python benchmarks/batch.py --dtype bfloat16 --shapes 4096x4096 --formats float --sparsity 0.5

Random weights, in up to 40 copies that are used in turn, so that large ones leave the cache; on a GPU a run is one CUDA
graph of 32 layers or more. "as dense" is the layer
where nothing is skipped: its weights are stored row by row of what can be skipped, and codes are widened first. Times
are medians of interleaved runs, over those of the dense layer in the same dtype.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.sparse_module import Thresholded
from sandcat.layers.stored_linear import StoredLinear
from sandcat.measuring.speed import Timer
from sandcat.models.view import ModelView, Site
from sandcat.rounding import quantised
from sandcat.support.devices import pick_device, pick_dtype

COPIES_BYTES = 256 << 20
MOST_COPIES = 40
LEAST_LAYERS = 32
KINDS = ("linear", "mlp")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", help="default bfloat16, on a CPU float32 too")
    parser.add_argument("--formats", default="float,int8", help="how weights are stored: float, int8, fp8")
    parser.add_argument("--shapes", help="hidden x neurons; a linear layer has both")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--batch", default="1,2,3,4,6,8,12,16")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    shapes = (options.shapes or ("4096x4096,4096x14336" if gpu else "576x1536,2048x8192")).split(",")
    dtypes = (options.dtype or ("bfloat16" if gpu else "float32,bfloat16")).split(",")
    torch.manual_seed(0)
    batches = [int(batch) for batch in options.batch.split(",")]
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, sparsity {options.sparsity}")
    print("layer   shape        dtype    format batch dense us  as dense    own  shared")
    most: dict[tuple, list[int]] = {}
    for dtype in map(pick_dtype, dtypes):
        for format in options.formats.split(","):
            for shape in shapes:
                for kind in KINDS:
                    dense, sparse = layers(kind, *map(int, shape.split("x")), dtype, format, device)
                    name = str(dtype).removeprefix("torch.")
                    pays = {"own": 0, "shared": 0}
                    for batch in batches:
                        took = times(dense, sparse, batch, dtype, options)
                        base = took.pop("dense")
                        ratios = "".join(f"{took[key] / base:>8.2f}" for key in took)
                        print(f"{kind:7} {shape:12} {name:9} {format:6} {batch:>5} "
                              f"{base * 1e6:>8.0f}  {ratios}", flush=True)  # fmt: skip
                        for key, largest in pays.items():
                            if took[key] <= base and largest == ([0, *batches][batches.index(batch)]):
                                pays[key] = batch
                    for key, largest in pays.items():
                        most.setdefault((kind, key, name, format), []).append(largest)
    print("\nlargest batch that pays at every shape")
    for (kind, key, name, format), found in most.items():
        print(f"{kind:7} {key:7} {name:9} {format:6} {min(found):>3}   by shape: {found}")


def layers(
    kind: str, hidden: int, neurons: int, dtype: torch.dtype, format: str, device: torch.device
) -> tuple[list, list[Thresholded]]:
    """The dense layers, in several copies, and as many sparse ones of the same weights."""
    size = hidden * neurons * dtype.itemsize * (1 if kind == "linear" else 3)
    copies = min(max(2, COPIES_BYTES // size), MOST_COPIES)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=copies, num_attention_heads=1, head_dim=8,
        num_key_value_heads=1, vocab_size=8,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).to(dtype).eval()
    dense, sparse = [], []
    for site in ModelView(model).sites():
        if site.kind == "mlp":
            dense.append(site.module if kind == "mlp" else site.module.up_proj)
            sparse.append(sparse_twin(site, kind, format))
    return dense, sparse


def sparse_twin(site: Site, kind: str, format: str) -> Thresholded:
    module = copy.deepcopy(site.module)
    if format != "float":
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(module, name, as_codes(getattr(module, name), format))
    twin = SparseMLP(replace(site, module=module)) if kind == "mlp" else SparseLinear(module.up_proj)
    twin.pack()
    return twin


def as_codes(linear: nn.Linear, format: str) -> StoredLinear:
    made = StoredLinear(linear, format)
    made.weight.data, made.weight_scale.data = quantised(linear.weight, format=format)
    return made


def times(dense: list, sparse: list[Thresholded], batch: int, dtype: torch.dtype, options) -> dict[str, float]:
    """Seconds a layer of each way."""
    x = torch.randn(batch, 1, hidden_of(sparse[0]), device=sparse[0].threshold.device).to(dtype)
    rounds = max(1, LEAST_LAYERS // len(sparse)) if x.is_cuda else 1
    for layer in sparse:
        level = layer.scores(x).float().quantile(options.sparsity)
        layer.threshold.data = torch.full_like(layer.threshold, float(level))

    def by_kernel(batch: str):
        def run() -> None:
            for layer in sparse * rounds:
                layer.batch = batch
                layer.by_kernel(x).to(dtype).view(len(x), 1, -1)

        return run

    variants = {
        "dense": lambda: [layer(x) for layer in dense * rounds],
        "as dense": lambda: [layer.dense(x) for layer in sparse * rounds],
        "own": by_kernel("own"),
        "shared": by_kernel("shared"),
    }
    taken = Timer(variants, x.device).medians(options.runs)
    return {name: seconds / len(sparse) / rounds for name, seconds in taken.items()}


def hidden_of(layer: Thresholded) -> int:
    weight: Tensor = layer.weight if isinstance(layer, SparseLinear) else layer.up()[0]
    return weight.shape[1]


if __name__ == "__main__":
    main()
