"""Text to calibrate on and to measure with: files, datasets of the hub, and two that need nothing but this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sandcat.errors import DataError
from sandcat.models.rotary import context, steady_length
from sandcat.support.processes import agreed
from sandcat.support.progress import track

WINDOW = 512
"""Tokens in a calibration window."""
MIN_TOKENS = 256
"""Fewer tokens than this measure nothing."""
SELF_SEQUENCES = 64
"""Sequences that a model writes side by side for `self`."""
SELF_SHORTEST = 64
"""Tokens a sequence, at least."""


@dataclass(frozen=True)
class Text:
    """Tokenised text: `ids_NL` holds N windows of L token ids, `source` and `sha256` say what it is."""

    ids_NL: Tensor
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return self.ids_NL.numel()

    def part(self, first: int, end: int) -> Text:
        """Some of its windows."""
        return made(self.ids_NL[first:end], self.source)


def check_ids(ids: Tensor, model: nn.Module, what: str) -> None:
    """
    Args:
        ids: token ids, of any shape.
        what: what they are of, as the error has it.

    Raises:
        DataError: the model has no embedding for one of them.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    wrong = ids[(ids < 0) | (ids >= rows)]
    if len(wrong):
        raise DataError(
            f"{what} has the token id {int(wrong[0])}, and this model's vocabulary ends at {rows - 1}: the tokenizer "
            "is another model's, or has tokens that the model was not resized for. Load the model's own tokenizer, or "
            "call model.resize_token_embeddings(len(tokenizer)), train what that adds, and save both."
        )


def made(ids_NL: Tensor, source: str) -> Text:
    """A text of these windows, with its digest."""
    return Text(ids_NL, source, hashlib.sha256(ids_NL.to(torch.int64).numpy().tobytes()).hexdigest())


def load_text(source: str, model: nn.Module, tokenizer, *, tokens: int, window: int = WINDOW, seed: int = 0) -> Text:
    """The first `tokens` tokens of a source, cut into windows, each after the tokens that the tokenizer starts with.

    Args:
        source: "self" (text that the model writes from `seed`), "python-docs" (the language reference that comes with
            Python), a text file, a .jsonl file with a "text" field, or a dataset id of the hub (train split).
        tokens: at most so many; a shorter text gives what it has.
        window: tokens a window; at most the model's context, and as many as give the same whole or token by token
            (`models.rotary`).

    Raises:
        DataError: missing, empty, too short, or not readable as text.
    """
    if tokens < MIN_TOKENS:
        raise DataError(f"{tokens} tokens are too few: ask for at least {MIN_TOKENS}.")
    window = min(window, context(model.config) or window, steady_length(model.config) or window)
    if source == "self":
        ids_NL = agreed(_write(model, tokenizer, tokens, window, seed))
        source = f"self (seed {seed})"
    else:
        ids = []
        for piece in _pieces(source):
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                break
        ids = ids[:tokens]
        check_ids(torch.tensor(ids, dtype=torch.long), model, repr(source))
        if len(ids) < MIN_TOKENS:
            raise DataError(
                f"{source!r} gives {len(ids)} tokens, and fewer than {MIN_TOKENS} measure nothing. Give a longer text."
            )
        first = _first_tokens(tokenizer)
        check_ids(torch.tensor(first, dtype=torch.long), model, "what the tokenizer puts before every text")
        window = min(window, len(ids) + len(first))
        length = window - len(first)
        ids_NL = torch.tensor([first + ids[i : i + length] for i in range(0, len(ids) // length * length, length)])
    return made(ids_NL, source)


def same_source(one: str, other: str) -> bool:
    """Whether two names stand for one text: the same name, or two paths to one file."""
    paths = [Path(name).resolve() for name in (one, other)]
    return one == other or (paths[0] == paths[1] and paths[0].is_file())


def _first_tokens(tokenizer) -> list[int]:
    """What this tokenizer puts before every text, such as Gemma's <bos>, without which it writes nonsense."""
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def _pieces(source: str) -> Iterator[str]:
    """The text of a source, piece by piece, so that no more is read than is needed."""
    path = Path(source)
    if source == "python-docs":
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif path.is_file():
        yield from _jsonl(path) if path.suffix == ".jsonl" else _file(path)
    elif path.suffix in (".txt", ".jsonl", ".md", ".json") or source.startswith((".", "/", "~")):
        raise DataError(f"there is no text file {source!r}.")
    else:
        yield from _hub(source)


def _file(path: Path) -> Iterator[str]:
    text = _read(path)
    yield from (text[i : i + 100_000] for i in range(0, len(text), 100_000))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not a UTF-8 text file ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error.strerror}).") from None


def _jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"]) + "\n\n"
        except (ValueError, KeyError, TypeError):
            raise DataError(f'line {number} of {str(path)!r} is not JSON with a "text" field.') from None


def _hub(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{name!r} is no file here, and datasets of the hub need the datasets library: pip install sandcat[eval]."
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise DataError(f"the dataset {name!r} has no 'text' column (it has {', '.join(row)}).")
            yield row["text"] + "\n\n"
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name!r} is neither a file here nor a dataset that can be loaded from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Without network, give a text file or "
            "use self."
        ) from None


@torch.no_grad()
def _write(model: nn.Module, tokenizer, tokens: int, window: int, seed: int) -> Tensor:
    """Text sampled from the model itself (temperature 1), starting from its first token: [N, window]."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DataError("this tokenizer has no first token to write from: give a text with --calibration.")
    stop = torch.tensor(sorted(stop_tokens(model, tokenizer)), dtype=torch.long)
    check_ids(torch.tensor([start]), model, "the tokenizer's first token")
    check_ids(stop, model, "the end of a text (eos_token_id of the tokenizer and the generation config)")
    rows = max(1, min(SELF_SEQUENCES, tokens // SELF_SHORTEST))
    window = min(window, -(-tokens // rows))
    rounds = -(-tokens // (rows * window))
    generator = torch.Generator().manual_seed(seed)
    written = []
    steps = iter(track(range(rounds * (window - 1)), "writing calibration text"))
    for _ in range(rounds):
        cache = DynamicCache(config=model.config.get_text_config())
        part = [torch.full((rows, 1), start)]
        for _ in range(window - 1):
            next(steps)
            logits = model(part[-1].to(model.device), past_key_values=cache, use_cache=True).logits[:, -1].float().cpu()
            logits[:, stop] = -torch.inf  # go on to the end of the window
            ladder = logits.softmax(-1).cumsum(-1)
            dart = torch.rand(rows, 1, generator=generator) * ladder[:, -1:]
            part.append(torch.searchsorted(ladder, dart).clamp(max=ladder.shape[-1] - 1))
        written.append(torch.cat(part, 1))
    next(steps, None)
    return torch.cat(written)


def stop_tokens(model: nn.Module, tokenizer) -> set[int]:
    """The token ids that end a text, of the generation config and of the tokenizer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
