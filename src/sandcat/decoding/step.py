"""A decode step in few kernels. On a GPU they are five a layer, instead of a compiler's dozen, for one sequence
(fused_gpu.py), and ten or more for 2 to 16 (fused_gpu_batch.py); on a CPU one for all layers (fused_cpu.py).

Once skipping has made the large kernels short, the small ones and the time between them are what is left of a step. The
fused step applies to the families whose row in models/families.py says so; others run the step of transformers,
compiled or not.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from sandcat.decoding.static_cache import DecodeCache
from sandcat.errors import UnsupportedModel
from sandcat.layers.prompts import only_follows
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.sparse_module import sparse_modules
from sandcat.layers.stored_linear import StoredLinear
from sandcat.models.view import Block, ModelView
from sandcat.ops import FORMATS, kernel_name

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the sequence is."""
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations that all attend to the whole cache."""
_LINEARS = (nn.Linear, StoredLinear, SparseLinear)


class Step(Protocol):
    """Called with ids [B, 1]: the logits [B, vocabulary] that follow; the tokens are added to the cache.

    The logits are overwritten by the next call, and the cache's position goes on by one. The B sequences are of one
    length and without padding, of which a step knows nothing: it sees all positions of the cache that are taken.
    """

    state: Tensor
    """float32 [B, H]: the residual state after the layers."""

    def __call__(self, ids_B1: Tensor) -> Tensor: ...


def fused_step(model: nn.Module, cache: DecodeCache) -> Step | None:
    """The fused step of a model over a cache that holds a prompt; None where it does not apply.

    It applies to up to `ops.MAX_TOKENS` sequences on CUDA with Triton and on a CPU with OpenMP, to families with
    `Architecture.fused_step` whose weights have one dtype (or are codes with scales of that) and lie on one device, and
    to modules that it knows (see `knows_all`). For one sequence on CUDA down projections have no bias; for several,
    `torch.use_deterministic_algorithms` is off. Each module skips or masks as it does in the step of transformers.
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
    if not knows_all(view, blocks) or model.config._attn_implementation not in _ATTENTION:
        return None
    if kernels == "triton" and not all(module.packed for module in sparse_modules(model).values()):
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


def knows_all(view: ModelView, blocks: list[Block]) -> bool:
    """Whether each module of the model is exactly of a class that every fused step knows.

    A subclass may compute something else, and so may a module with a hook, with an adapter, or with a `forward` of its
    own: then none of them applies.
    """
    modules = list(view.model.modules())
    if any(map(_is_changed, modules)):
        return False
    linears = {linear for block in blocks for linear in block.linears} | {view.model.get_output_embeddings()}
    mlps = {block.mlp.module for block in blocks}
    return all(
        type(m) in _LINEARS if m in linears else (m in mlps and type(m) is SparseMLP) or view.is_stock(m)
        for m in modules
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more than its class says: by hooks, but for those that follow prompts, or by a forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(map(only_follows, hooks))
