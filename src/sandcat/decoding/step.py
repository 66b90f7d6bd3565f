"""A decode step in few kernels. On a GPU they are five a layer, instead of a compiler's dozen, for one sequence
(fused_gpu.py), and ten or more for 2 to 16 (fused_gpu_batch.py); on a CPU one for all layers (fused_cpu.py).

Once skipping has made the large kernels short, the small ones and the time between them are what is left of a step. The
fused step applies to the families whose row in models/families.py says so; others run the step of transformers,
compiled or not.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from transformers.cache_utils import Cache

from sandcat.errors import UnsupportedModel
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.sparse_module import Sparse
from sandcat.models.view import ModelView
from sandcat.ops import FORMATS, kernel_name

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the sequence is."""


class Step(Protocol):
    """Called with ids [B, 1]: the logits [B, vocabulary] that follow; the tokens are added to the cache.

    The logits are overwritten by the next call. The B sequences are of one length and without padding, of which a
    step knows nothing: it sees all positions of the cache that are taken.
    """

    position: Tensor
    """int32 [1]: how many positions of the cache are taken."""

    def __call__(self, ids_B1: Tensor) -> Tensor: ...


def fused_step(model: nn.Module, cache: Cache) -> Step | None:
    """The fused step of a model over a static cache that holds a prompt; None where it does not apply.

    It applies to up to `ops.MAX_TOKENS` sequences on CUDA with Triton and on a CPU with OpenMP, to families with
    `Architecture.fused_step` whose weights have one dtype (or are codes with scales of that) and lie on one device, and
    whose modules are without hooks and adapters, which it would pass over. For one sequence on CUDA down projections
    have no bias; for several, `torch.use_deterministic_algorithms` is off. Each module skips or runs dense as it does
    in the step of transformers.
    """
    kernels = kernel_name("sparse_mlp", model.device)
    if kernels not in ("triton", "numba"):
        return None
    try:
        view = ModelView(model)
        if not view.architecture.fused_step or view.decoder.rotary_emb.rope_type not in _ROPE_TYPES:
            return None
        blocks = list(view.blocks())
    except UnsupportedModel:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()):
        return None
    if any(isinstance(block.mlp.module, Sparse) and not isinstance(block.mlp.module, SparseMLP) for block in blocks):
        return None
    codes = {row.codes for row in FORMATS.values()}
    if len({(p.dtype, p.device) for p in model.parameters() if p.dtype not in codes}) != 1:
        return None
    batch = len(cache.layers[0].keys)
    if kernels == "numba":
        from sandcat.decoding import fused_cpu  # here, as not every machine has Numba's kernels

        return fused_cpu.CpuStep(view, blocks, cache) if fused_cpu.applies(view, blocks, batch) else None
    from sandcat.decoding import (
        fused_gpu,
        fused_gpu_batch,  # nor Triton's
    )

    if batch > 1:
        return fused_gpu_batch.GpuBatchStep(view, blocks, cache) if fused_gpu_batch.applies(batch) else None
    return fused_gpu.GpuStep(view, blocks, cache) if fused_gpu.applies(view, blocks) else None
