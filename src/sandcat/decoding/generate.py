"""The decode loop: a static cache, a step that is compiled and captured in a CUDA graph, and tokens as they come."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sandcat.data import check_ids, stop_tokens
from sandcat.decoding.decoder import Decoder
from sandcat.errors import DataError
from sandcat.models.rotary import context


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each sequence, [B, 1]: the likeliest at temperature 0, else drawn.

    Args:
        top_k: draw from the k likeliest only (0: from all).
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to p.
    """
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k:
        least = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p < 1:
        ordered, index = logits_BV.sort(descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(-1, index, ordered)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)


def encode(tokenizer, prompt: str | list[dict[str, str]], *, chat: bool | None = None) -> Tensor:
    """A prompt as token ids [1, T].

    Args:
        prompt: text, or chat messages as {"role": ..., "content": ...}.
        chat: wrap a text in the chat template as a user's message; default where the tokenizer has one.

    Raises:
        DataError: an empty prompt, or a chat without a template.
    """
    if chat is None:
        chat = tokenizer.chat_template is not None
    if isinstance(prompt, str) and not chat:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise DataError("this tokenizer has no chat template: give plain text, and no --chat.")
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
    if ids.shape[1] == 0:
        raise DataError("the prompt is empty.")
    return ids


def prompt_ids(model: nn.Module, tokenizer, prompt: str | list[dict[str, str]], *, chat: bool | None = None) -> Tensor:
    """A prompt as token ids [1, T] that the model can read, with room for an answer. Arguments as in `encode`.

    Raises:
        DataError: as `encode`; one as long as the model's context, or with ids beyond its vocabulary.
    """
    ids_1T = encode(tokenizer, prompt, chat=chat)
    holds = context(model.config)
    if holds is not None and ids_1T.shape[1] >= holds:
        raise DataError(f"the prompt has {ids_1T.shape[1]} tokens, and the model's context holds {holds}.")
    check_ids(ids_1T, model, "the prompt")
    return ids_1T


def generate(
    model: nn.Module,
    tokenizer,
    prompt: str | list[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
    compile: str | None = "fused",
) -> Iterator[str]:
    """Writes on from a prompt, yielding text as it comes, until a stop token or `max_new_tokens`.

    Arguments as in `encode`, `sample` and `Decoder`; the same `seed` gives the same text on the same machine.

    Raises:
        DataError: as `prompt_ids`, or an option outside its range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise DataError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}, max_new_tokens={max_new_tokens}: temperature "
            "and top_k must be at least 0, top_p in (0, 1], max_new_tokens at least 1."
        )
    ids_BT = prompt_ids(model, tokenizer, prompt, chat=chat)
    length = ids_BT.shape[1] + max_new_tokens
    decoder = Decoder(model, min(context(model.config) or length, length), compile=compile)
    stop = stop_tokens(model, tokenizer)
    generator = torch.Generator(model.device).manual_seed(seed)
    logits = decoder.prefill(ids_BT)
    written: list[int] = []
    shown = ""
    while True:
        ids_B1 = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        token = int(ids_B1)
        if token in stop:
            break
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else a character is still incomplete
            yield text[len(shown) :]
            shown = text
        if len(written) == max_new_tokens or decoder.length == decoder.max_length:
            break
        logits = decoder.step(ids_B1)
    rest = tokenizer.decode(written, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest
