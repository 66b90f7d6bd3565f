"""Contexts in which the skipping modules of a model run otherwise, or are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from sandcat.layers.reading import Told
from sandcat.layers.sparse_module import Sparse, prompts_of, sparse_modules


def chooses_in_prompt(model: nn.Module) -> bool:
    """Whether some module needs a prompt before it skips anything."""
    return any(module.chooses_in_prompt for module in sparse_modules(model).values())


@contextmanager
def every_token_sparse(model: nn.Module, *, prompt: int = 1, lockstep: bool = False) -> Iterator[None]:
    """Within this context prompts are computed sparsely too, so that a whole text measures what decoding would give.

    It holds for this thread's forwards, and changes nothing in the model. Sequences share nothing but in lockstep, in
    whatever batches they come.

    Args:
        prompt: the first so many tokens of each sequence are what a model that chooses in a prompt chooses by; it
            computes them whole, and the others as decoding would after them.
        lockstep: the sequences of a forward go on together, so that they share at each position what they would share
            in a decode step.
    """
    with _told(model, Told(max(1, prompt), sparse=True, together=lockstep)):
        yield


@contextmanager
def prompt_of(model: nn.Module, tokens: int) -> Iterator[None]:
    """Within this context the first so many tokens of each sequence are its prompt (padding included), however they are
    put into forwards: for loops of your own, which read a prompt in chunks or verify drafts. `generate` knows it.
    """
    with _told(model, Told(tokens)):
        yield


@contextmanager
def _told(model: nn.Module, told: Told) -> Iterator[None]:
    prompts = prompts_of(model)
    with nullcontext() if prompts is None else prompts.tell(told):
        yield


@contextmanager
def counting_dropped(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Within this context every forward adds [neurons dropped, neurons in all] to the site's entry."""
    counts: dict[str, list[int]] = {}
    handles = []
    for name, module in sparse_modules(model).items():
        counts[name] = [0, 0]

        def count(module: Sparse, args: tuple, output: Tensor, entry: list[int] = counts[name]) -> None:
            kept = module.kept(args[0])
            entry[0] += kept.numel() - int(kept.sum())
            entry[1] += kept.numel()

        handles.append(module.register_forward_hook(count))  # when it is known what was chosen
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
