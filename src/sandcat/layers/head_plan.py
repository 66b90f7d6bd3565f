"""What the key-value heads of a layer keep of the tokens before: all, or a window.

Shapes: B sequences, Q new tokens, K keys, N key-value heads, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sandcat.errors import UnsupportedModel

NAME = "cache"
"""Of the child of an attention module that is its head plan."""


class HeadPlan(nn.Module):
    """What each head keeps. In transformers' forward it is a mask for each head; the caches of fused steps hold as many
    pages as it says, and read no others.

    Args:
        windows: of each key-value head, how many tokens it keeps, the own included; 0 for all.
    """

    in_steps = True
    """Fused steps do what its hook does."""

    def __init__(self, windows: Sequence[int]):
        super().__init__()
        self.windows = tuple(windows)

    def mask(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the forward of an attention module: its mask, less what heads do not keep.

        Raises:
            UnsupportedModel: an implementation that takes no such mask, as flash and flex attention, and continuous
                batching, whose rows hold many requests.
        """
        states = args[0] if args else kwargs["hidden_states"]
        cache, given, Q = kwargs.get("past_key_values"), kwargs.get("attention_mask"), states.shape[1]
        past, keys, offset = 0, Q, 0
        if cache is not None:
            past = cache.get_seq_length(attention.layer_idx)
            keys, offset = cache.get_mask_sizes(Q, attention.layer_idx)
        implementation = attention.config._attn_implementation
        packed = kwargs.get("cache") is not None  # of continuous batching
        if implementation not in ("sdpa", "eager") or packed or not (given is None or isinstance(given, Tensor)):
            raise UnsupportedModel(
                "heads that keep a window each need a mask for each, which continuous batching does not take, nor "
                f"attn_implementation={implementation!r} if it is not 'sdpa' or 'eager': load the model with one of "
                "these, and use model.generate."
            )
        query_Q1 = past + torch.arange(Q, device=states.device)[:, None]
        key_K = offset + torch.arange(keys if given is None else given.shape[-1], device=states.device)
        back_QK = query_Q1 - key_K
        seen_NQK = torch.stack([back_QK < (window or 2**31) for window in self.windows]) & (back_QK >= 0)
        heads = attention.config.num_attention_heads // len(self.windows)
        seen_1HQK = seen_NQK.repeat_interleave(heads, 0)[None]
        if given is None:
            mask = seen_1HQK
        elif given.dtype == torch.bool:
            mask = given & seen_1HQK
        else:
            mask = torch.where(seen_1HQK, given, torch.finfo(given.dtype).min)
        if implementation == "eager" and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    def extra_repr(self) -> str:
        return f"windows={self.windows}"


def head_plan_of(attention: nn.Module) -> HeadPlan | None:
    """That of an attention module; None if all heads keep all."""
    plan = getattr(attention, NAME, None)
    return plan if isinstance(plan, HeadPlan) else None


def follow_head_plans(model: nn.Module) -> None:
    """Has attention modules mask what their heads do not keep."""
    for attention in list(model.modules()):
        if plan := head_plan_of(attention):
            attention.register_forward_pre_hook(plan.mask, with_kwargs=True)
