"""A decode step in few kernels. On a GPU they are five a layer, instead of a compiler's dozen, for one sequence
(fused_gpu.py), and ten or more for 2 to 16 (fused_gpu_batch.py); on a CPU one for all layers (fused_cpu.py).

Once skipping has made the large kernels short, the small ones and the time between them are what is left of a step. The
fused step applies to the families whose row in models/families.py says so; others run the step of transformers,
compiled or not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from sandcat.errors import UnsupportedModel
from sandcat.layers.cache import Keeps, PagedCache
from sandcat.layers.head_plan import HeadPlan, head_plan_of
from sandcat.layers.sparse_module import sparse_modules
from sandcat.layers.step_parts import is_changed
from sandcat.models.view import Block, ModelView
from sandcat.ops import kernel_name

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long the sequence is."""
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations that all attend to the whole cache."""
PAGE = 256
"""Tokens of a page, at most."""


class DecodeStep(Protocol):
    """Called with ids [B, 1]: the logits [B, vocabulary] that follow; the tokens are added to the cache.

    The logits are overwritten by the next call, and the lengths of the cache, which it reads there, go on by one.
    """

    state: Tensor
    """float32 [B, H]: the residual state after the layers."""

    def __call__(self, ids_B1: Tensor) -> Tensor: ...


def cache_of_step(model: nn.Module, max_length: int, batch: int) -> PagedCache | None:
    """The cache for the fused step of so many sequences; None where that does not apply.

    Args:
        max_length: tokens of a sequence, its padding included, at most.
    """
    if _maker(model, batch) is None:
        return None
    page = min(PAGE, 1 << (max_length - 1).bit_length())
    if batch == 1 and kernel_name("sparse_mlp", model.device) == "triton":
        page = max_length  # the kernels of one sequence read all keys of a head in one piece
    keeps = [_keeps(block) for block in ModelView(model).blocks()]
    if any(own.heads for own in keeps):
        page = min(PAGE, 1 << (max_length - 1).bit_length())
    return PagedCache(keeps, max_length, batch, page, model.device)


def _keeps(block: Block) -> Keeps:
    """What the heads of a layer keep, by the family and by its head plan."""
    plan = head_plan_of(block.self_attn)
    return Keeps(block.window, plan and tuple(window or None for window in plan.windows))


def fused_step(model: nn.Module, cache: PagedCache) -> DecodeStep | None:
    """The fused step of a model over a cache that holds a prompt; None where it does not apply.

    It applies to up to `ops.MAX_TOKENS` sequences on CUDA with Triton and on a CPU with OpenMP, to families with
    `Architecture.fused_step` that lie on one device, and that are what transformers has for them but for linear layers
    and MLPs. Of these each that the step has a launcher for runs by it, if its weights have the dtype of the model (or
    are codes with scales of that), and any other is called. For several sequences on CUDA,
    `torch.use_deterministic_algorithms` is off. Each module skips or masks as it does in the step of transformers.
    """
    maker = _maker(model, len(cache.pads))
    return None if maker is None else maker(cache)


def _maker(model: nn.Module, batch: int) -> Callable[[PagedCache], DecodeStep] | None:
    """What makes the fused step of so many sequences; see `fused_step`."""
    kernels = kernel_name("sparse_mlp", model.device)
    if kernels not in ("triton", "numba"):
        return None
    try:
        view = ModelView(model)
        if not view.architecture.fused_step or view.decoder.rotary_emb.rope_type not in _ROPE_TYPES:
            return None
        if not _is_stock(view) or model.config._attn_implementation not in _ATTENTION:
            return None
    except UnsupportedModel:
        return None
    if len({p.device for p in model.parameters()}) != 1 or _is_sharded(model):
        return None
    if kernels == "numba":
        from sandcat.decoding.fused_cpu import CpuStep, applies  # here, as not every machine has Numba's kernels

        return partial(CpuStep, view) if applies(view, batch) else None
    from sandcat.decoding import fused_gpu, fused_gpu_batch  # nor Triton's

    if batch > 1 or any(head_plan_of(block.self_attn) for block in view.blocks()):
        return partial(fused_gpu_batch.GpuBatchStep, view) if fused_gpu_batch.applies(batch) else None
    return partial(fused_gpu.GpuStep, view)


def _is_stock(view: ModelView) -> bool:
    """Whether all modules that a step computes itself, or passes over, are just what transformers has.

    A subclass may compute something else, and so may a module with a hook or a `forward` of its own. Linear layers and
    MLPs may be anything that gives the same outside of the model's forward: see `step_parts.part_of`.
    """
    parts = [view.model.get_output_embeddings()]
    for block in view.blocks():
        parts += [*block.attention, block.mlp.module]
    inside = {module for part in parts for module in part.modules()}
    if any(module.chooses_in_prompt for module in sparse_modules(view.model).values()):
        return False
    others = [module for module in view.model.modules() if module not in inside and type(module) is not HeadPlan]
    dtypes = {parameter.dtype for module in others for parameter in module.parameters(recurse=False)}
    return len(dtypes) == 1 and all(view.is_stock(m) and not is_changed(m) for m in others)


def _is_sharded(model: nn.Module) -> bool:
    """Whether several devices have parts of it."""
    return (getattr(model, "tp_size", None) or 1) > 1 or any(hasattr(p, "device_mesh") for p in model.parameters())
