"""Bytes that a decode step reads: those of a dense model, and those that skipping leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sandcat.decoding.decoder import Decoder
from sandcat.layers.op_module import kernel_modules
from sandcat.layers.sparse_module import sparse_modules
from sandcat.layers.weights import stored_of
from sandcat.models.view import ModelView


@torch.inference_mode()
def step_bytes(model: nn.Module, ids_BT: Tensor) -> int:
    """Bytes that one decode step after `ids_BT` reads: weights (what is skipped left out), thresholds, and the cache.

    A neuron counts if any sequence of the batch uses it. Embedding rows are too few to count.
    """
    read: dict[nn.Module, int] = {}
    decoder = Decoder(model, ids_BT.shape[1], batch=len(ids_BT))
    decoder.prefill(ids_BT[:, :-1])  # not counted: in it some methods choose what they read afterwards
    skipping = sparse_modules(model).values()
    within = {m for module in skipping for m in module.modules() if m is not module and m not in skipping}
    handles = [
        module.register_forward_pre_hook(lambda m, args: read.__setitem__(m, m.bytes_read(args[0])))
        for module in kernel_modules(model).values()
        if module not in within  # what skips counts what is inside it
    ]
    try:
        model(ids_BT[:, -1:].to(model.device), past_key_values=decoder.cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    inside = {p for module in read for p in module.parameters()}
    return read_bytes(model) - sum(p.nbytes for p in inside) + sum(read.values()) + decoder.cache.bytes_read()


def read_bytes(model: nn.Module) -> int:
    """Bytes of weights that a dense step reads: the text decoder's, but of an embedding only if it is the head too."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    decoder = sum(p.nbytes for p in ModelView(model).decoder.parameters() if p is not table)
    return decoder + sum(p.nbytes for p in head.parameters())


def dense_bytes(model: nn.Module) -> int:
    """`read_bytes`, if weights that are stored as codes were in the model's dtype."""
    coded = [stored_of(m) for m in model.modules() if getattr(m, "weight_scale", None) is not None]
    saved = sum(w.codes.numel() * w.like.itemsize - w.codes.nbytes - w.like.nbytes for w in coded)
    return read_bytes(model) + saved


def bytes_share(sparse: nn.Module, dropped: dict[str, float]) -> float:
    """Bytes of weights, thresholds and factors that a step of one token reads, dense = 1, if so much is dropped."""
    modules = sparse_modules(sparse)
    inside = {p for module in modules.values() for p in module.parameters()}
    read = sum(modules[name].weight_bytes(1 - share) for name, share in dropped.items())
    return (read_bytes(sparse) - sum(p.nbytes for p in inside) + read) / dense_bytes(sparse)
