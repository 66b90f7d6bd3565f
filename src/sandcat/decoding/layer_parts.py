"""The layers of a model as fused steps take them: branches of the residual state, made of parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sandcat.layers.cache import PagedCache
from sandcat.layers.step_parts import Attention, Branch, GatedNeurons, Norm, Part, is_changed, part_of
from sandcat.models.view import Block, ModelView


class ModelParts(NamedTuple):
    """What a step runs, in order; the branch of the head gives logits."""

    layers: list[list[Branch]]
    head: Branch
    heads: int
    """Query heads of a layer."""
    neurons: int
    """Of the MLP of a layer, at most."""
    vocabulary: int
    """How many logits there are."""


def model_parts(view: ModelView, cache: PagedCache) -> ModelParts:
    """The parts of a model for a step over a cache that holds a prompt."""
    table = view.model.get_input_embeddings().weight
    x_B1H = torch.empty(len(cache.pads), 1, 0, dtype=table.dtype, device=table.device)
    layers, config = [], view.text_config
    neurons = [config.intermediate_size]
    for block, cached in zip(view.blocks(), cache.layers, strict=True):
        q, k, v, o = (part_of(linear, x_B1H) for linear in block.attention)
        q_norm, k_norm = (None if norm is None else _norm(norm) for norm in (block.q_norm, block.k_norm))
        attention = Attention(q, k, v, o, q_norm, k_norm, block.scaling, cached)
        mlp = _mlp(view, block, x_B1H)
        neurons.append(getattr(getattr(mlp, "gate", None), "outputs", 0))
        layers.append([Branch(_norm(block.input_norm), attention), Branch(_norm(block.mlp_norm), mlp)])
    head = Branch(_norm(view.decoder.norm), part_of(view.model.get_output_embeddings(), x_B1H))
    vocabulary = getattr(head.part, "outputs", config.vocab_size)
    return ModelParts(layers, head, config.num_attention_heads, max(neurons), vocabulary)


def _mlp(view: ModelView, block: Block, x_B1H: Tensor) -> Part:
    """That of a module of transformers', which does not describe itself, or what the module says."""
    module, row = block.mlp.module, block.mlp.architecture
    linears = [getattr(module, name, None) for name in (row.gate, row.up, row.down)]
    others = [module, *(child for child in module.children() if child not in linears)]
    if not all(view.is_stock(m) and not is_changed(m) for m in others):
        return part_of(module, x_B1H)
    gate, up, down = (part_of(linear, x_B1H) for linear in linears)
    return GatedNeurons(module, gate, up, down, block.mlp.activation)


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
