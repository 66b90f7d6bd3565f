"""TEAL's published way to skip inputs, as a baseline for ours: written anew from what is known of its kernel.

Paper: TEAL, Liu et al., 2024, arXiv 2408.14690. The weight is stored by channels. Its columns are cut into tiles and
its channels into splits; a program compares its split of x with the thresholds and loads its part of the weight, the
rows of dropped channels masked off. There is no list of what is kept. Sums of splits meet in y, which is zeroed
before, by atomics in the model's dtype. One launch a layer (q, k and v are one, with three thresholds), for one token;
tiles and splits are tuned once a shape. The step around it is compiled.
"""

from __future__ import annotations

import copy
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sandcat.layers.sparse_linear import SparseLinear
from sandcat.models.view import ModelView
from sandcat.ops.sparse_linear import reference
from sandcat.ops.triton.primitives.arguments import three, three_sizes
from sandcat.ops.triton.primitives.blocks import which_of_three
from sandcat.ops.weights import Stored

CONFIGS = [
    triton.Config({"CHANNELS": channels, "BLOCK": block}, num_warps=warps)
    for channels, block, warps in product((16, 32, 64, 128), (64, 128, 256, 512), (4, 8))
    if 32 <= channels * block // (32 * warps) <= 64
]


@triton.jit
def masked_rows(x, weights, thresholds, y, sizes, K, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """y += products of x with up to three matrices of K channels, and of so many columns, one after another."""
    w, size, cols, before = which_of_three(tl.program_id(0), weights, sizes, BLOCK)
    threshold = which_of_three(tl.program_id(0), thresholds, sizes, BLOCK)[0]
    i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x_i = tl.load(x + i, mask=i < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
    keep = (i < K) & (tl.abs(x_i) > tl.load(threshold + i, mask=i < K, other=0.0).to(tl.float32))
    at = w + i.to(tl.int64)[:, None] * size + cols[None, :]
    w_ic = tl.load(at, mask=keep[:, None] & (cols < size)[None, :], other=0.0, eviction_policy="evict_first")
    total = tl.sum(w_ic.to(tl.float32) * x_i[:, None], 0)
    tl.atomic_add(y + before + cols, total.to(y.dtype.element_ty), mask=cols < size, sem="relaxed")


tuned = triton.autotune(CONFIGS, key=["sizes", "K"], reset_to_zero=["y"])(masked_rows)


@torch.library.custom_op("sandcat_benchmarks::teal", mutates_args=())
def teal(x_I: Tensor, weights_IO: list[Tensor], thresholds_I: list[Tensor]) -> Tensor:
    """The outputs of up to three layers, one after another, each with what is above its thresholds; on a CPU by the
    definition."""
    if x_I.device.type == "cpu":
        pairs = zip(weights_IO, thresholds_I, strict=True)
        return torch.cat([reference(x_I[None], Stored(w.t()), t)[0].to(x_I.dtype) for w, t in pairs])
    sizes = [w.shape[1] for w in weights_IO]
    y = torch.zeros(sum(sizes), dtype=x_I.dtype, device=x_I.device)

    def grid(config: dict) -> tuple[int, int]:
        return sum(triton.cdiv(size, config["BLOCK"]) for size in sizes), triton.cdiv(len(x_I), config["CHANNELS"])

    tuned[grid](x_I, three(weights_IO), three(thresholds_I), y, three_sizes(sizes), len(x_I))
    return y


@teal.register_fake
def _(x_I, weights_IO, thresholds_I):
    return x_I.new_empty(sum(w.shape[1] for w in weights_IO))


class Launch:
    """Layers of one input that run at once; what they gave last."""

    def __init__(self, layers: list[SparseLinear]):
        self.weights, self.thresholds = [m.weight.t() for m in layers], [m.threshold for m in layers]
        self.y: Tensor | None = None


class Part(nn.Module):
    """One of the layers of a launch. The first, which a model calls first, runs it."""

    def __init__(self, layer: SparseLinear, launch: Launch, start: int):
        super().__init__()
        self.layer, self.launch, self.start = layer, launch, start

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1]:
            return self.layer(x)
        if self.start == 0:
            self.launch.y = teal(x.flatten(), self.launch.weights, self.launch.thresholds)
        y = self.launch.y[self.start : self.start + self.layer.out_features].view(*x.shape[:-1], -1)
        return y if self.layer.bias is None else y + self.layer.bias


def as_published(model: nn.Module) -> nn.Module:
    """A model with teal's layers, with the same weights in the same memory, running them in the published way."""
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    view, launches = ModelView(model), {}
    for site in view.sites():
        if isinstance(site.module, SparseLinear):
            launch = "qkv" if site.kind in ("q", "k", "v") else site.kind
            launches.setdefault((site.layer, launch), []).append(site)
    for sites in launches.values():
        launch, start = Launch([site.module for site in sites]), 0
        for site in sites:
            view.replace(site, Part(site.module, launch, start))
            start += site.module.out_features
    return model


def error_of_kernel(model: nn.Module) -> float:
    """The worst relative RMS error of the kernel at the layers of a model that `as_published` gave; each shape once."""
    launches = [module.launch for module in model.modules() if isinstance(module, Part)]
    shapes = {(launch.weights[0].shape, len(launch.weights)): launch for launch in launches}
    worst = 0.0
    for launch in shapes.values():
        x = torch.randn_like(launch.thresholds[0])
        pairs = zip(launch.weights, launch.thresholds, strict=True)
        want = torch.cat([reference(x[None], Stored(weight.t()), threshold)[0] for weight, threshold in pairs])
        worst = max(worst, float((teal(x, launch.weights, launch.thresholds) - want).norm() / want.norm()))
    return worst
