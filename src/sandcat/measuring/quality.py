"""Quality: the sparse model beside the dense one, on the same text, with every token computed sparsely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sandcat.data import Text, check_ids
from sandcat.errors import DataError
from sandcat.layers.modes import chooses_in_prompt, counting_dropped, every_token_sparse
from sandcat.models.rotary import forget_length
from sandcat.support.processes import everyones, in_order, mine
from sandcat.support.progress import track

WINDOW = 1024
"""Tokens in an evaluation window; every token but the first of each window is scored."""
PROMPT_SHARE = 4
"""Where a model chooses in a prompt what it computes after it, the first of so many parts of each window is its prompt.
No model that is compared there is scored on it."""


@dataclass(frozen=True)
class TextResult:
    """Dense against sparse on one text. Errors are standard errors over windows."""

    source: str
    sha256: str
    tokens: int
    """Tokens scored."""
    window: int
    prompt: int
    """First tokens of each window that are not scored, as some model chooses by them what it computes after them."""
    dense_perplexity: float
    sparse_perplexity: float
    ratio: float
    """Sparse perplexity over dense."""
    ratio_error: float
    kl: float
    """Mean KL divergence of the sparse next-token distribution from the dense one, in nats."""
    kl_error: float
    agreement: float
    """Share of positions where both models' likeliest next token is the same."""
    agreement_error: float
    batch: int = 1
    """Windows that the sparse model read in lockstep, each position a decode step of so many sequences."""


@torch.inference_mode()
def evaluate_text(
    dense: nn.Module, sparse: Sequence[nn.Module], text: Text, *, batch: int = 1
) -> list[tuple[TextResult, dict[str, float]]]:
    """For each sparse model: perplexity beside the dense one, KL and agreement; and the neurons dropped at each site.

    Several processes share the windows.

    Args:
        dense, sparse: models with one vocabulary.
        text: windows of token ids, as `data.load_text` gives them.
        batch: so many windows, from places far apart, are read in lockstep by the sparse models: each position is a
            decode step of so many sequences. What is left over is not read. Every module skips, also where a step of so
            many sequences would run dense.

    Raises:
        DataError: windows too short for a prompt, or fewer than `batch`; or ids beyond a model's vocabulary.
    """
    if batch < 1 or batch > len(text.ids_NL):
        raise DataError(
            f"a batch of {batch} needs as many windows of {WINDOW} tokens, and {text.source} gives "
            f"{len(text.ids_NL)}: ask for more tokens."
        )
    for model in (dense, *sparse):
        check_ids(text.ids_NL, model, text.source)
        forget_length(model)
    steps_NBL = text.ids_NL[: len(text.ids_NL) // batch * batch].unflatten(0, (batch, -1)).transpose(0, 1)
    length = text.ids_NL.shape[1]
    prompt = length // PROMPT_SHARE if any(map(chooses_in_prompt, sparse)) else 0
    if prompt and length < 4 * PROMPT_SHARE:
        raise DataError(f"windows of {length} tokens are too short to choose neurons in a prompt: give a longer text.")
    measured: list[list[list[Tensor]]] = [[] for _ in sparse]
    with ExitStack() as stack:
        dropped = []
        for model in sparse:
            stack.enter_context(every_token_sparse(model, prompt=prompt, lockstep=batch > 1))
            dropped.append(stack.enter_context(counting_dropped(model)))
        for ids_BL in track(mine(steps_NBL), f"evaluating on {Path(text.source).name}"):
            log_p = [_log_probabilities(dense, ids_1L)[0, prompt:] for ids_1L in ids_BL[:, None]]
            for model, rows in zip(sparse, measured, strict=True):
                log_q = _log_probabilities(model, ids_BL)[:, prompt:]
                rows.append([_compared(*row) for row in zip(log_p, log_q, ids_BL[:, prompt + 1 :], strict=True)])
    results = []
    for windows, counts in zip(measured, dropped, strict=True):
        rows = torch.stack([row for rows in in_order(windows) for row in rows])
        change = mean_and_error(rows[:, 1] - rows[:, 0])
        ratio = math.exp(change[0])
        result = TextResult(
            text.source, text.sha256, len(rows) * (length - prompt - 1), length, prompt,
            math.exp(rows[:, 0].mean()), math.exp(rows[:, 1].mean()), ratio, ratio * change[1],
            *mean_and_error(rows[:, 2]), *mean_and_error(rows[:, 3]), batch,
        )  # fmt: skip
        own = everyones(counts)
        everywhere = {name: map(sum, zip(*(part[name] for part in own), strict=True)) for name in counts}
        results.append((result, {name: drops / max(1, total) for name, (drops, total) in everywhere.items()}))
    return results


def _log_probabilities(model: nn.Module, ids_BL: Tensor) -> Tensor:
    logits = model(ids_BL.to(model.device), use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


def _compared(log_p: Tensor, log_q: Tensor, target_L: Tensor) -> Tensor:
    """Both losses, KL and agreement of one window, float64 [4], from log probabilities [L, vocabulary]."""
    log_q, target = log_q.to(log_p.device), target_L[:, None].to(log_p.device)
    losses = [-log.gather(1, target).double().mean() for log in (log_p, log_q)]
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(target)
    return torch.stack([*losses, kl.double(), (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()]).cpu()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value, whose spread is unknown)."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
