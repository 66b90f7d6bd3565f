"""The maths: each op is defined by its torch reference; kernels for a device are added where it has them.

`kernel_name` says what runs an op on a device (registry.py), `most_tokens` up to how many tokens that pays (pays.py).
"""

from sandcat.ops.checks import MAX_TOKENS, PROMPT_CHUNK
from sandcat.ops.core_mlp import core_mlp
from sandcat.ops.masks import drop_up, mask
from sandcat.ops.paged_attention import paged_attention, paged_write
from sandcat.ops.pays import most_tokens
from sandcat.ops.registry import kernel_name
from sandcat.ops.shared_units import shared_linear, shared_up_down
from sandcat.ops.sparse_linear import sparse_linear
from sandcat.ops.sparse_mlp import sparse_mlp, sparse_up_down
from sandcat.ops.sparse_up import sparse_up
from sandcat.ops.stored_linear import stored_linear
from sandcat.ops.weights import CODED, FORMATS, Stored

__all__ = [
    "CODED", "FORMATS", "MAX_TOKENS", "PROMPT_CHUNK", "Stored", "core_mlp", "drop_up", "kernel_name", "mask",
    "most_tokens", "paged_attention", "paged_write", "shared_linear", "shared_up_down", "sparse_linear", "sparse_mlp",
    "sparse_up", "sparse_up_down", "stored_linear",
]  # fmt: skip
