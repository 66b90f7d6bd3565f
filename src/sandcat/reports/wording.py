"""Figures in words: a result as rows of dense, sparse and change, each ready to print."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sandcat.measuring.quality import TextResult
    from sandcat.measuring.speed import SpeedResult
    from sandcat.measuring.tasks import TaskResult
    from sandcat.plans.plan import Budget

NOTHING_SAVED = {
    "reference": "no kernel pays for this device and batch: the reference ran, nothing is saved",
    "masked": "skipping does not pay for so many sequences at once here: what is dropped is read, and counts as 0, so "
    "nothing is saved",
    "dense": "skipping does not pay for so many sequences at once here, so the step runs dense, and nothing is saved",
}
"""By what ran a step, why it saves nothing; in reports from before it was masked, "dense"."""


class Pair(NamedTuple):
    """One row, ready to print; an empty text where there is nothing to say."""

    label: str
    dense: str
    sparse: str
    change: str


def figure(value: float | None, digits: int = 4) -> str:
    """A number in so many significant digits; "not a number" where it is none."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".") if value else "0"


def per_cent(value: float | None, error: float | None = 0.0) -> str:
    """A fraction in per cent."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{100 * value:.1f}{_error(100 * (error or 0), '.1f')} %"


def milliseconds(seconds: float) -> str:
    """Seconds in ms, three digits."""
    return f"{figure(1e3 * seconds, 3)} ms"


def size(count: float) -> str:
    """Bytes in decimal units."""
    power = min(4, max(0, int(math.log10(count)) // 3)) if count >= 1 else 0
    return f"{figure(count / 1000**power, 4) if power else int(count)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _error(error: float | None, form: str) -> str:
    """A standard error to append; nothing where it is unknown."""
    return f" ± {error:{form}}" if error and math.isfinite(error) else ""


def text_title(text: TextResult) -> str:
    """Over the figures of one text."""
    return f"Quality on {text.source}" + (f", batch {text.batch}" if text.batch > 1 else "")


def text_pairs(text: TextResult) -> list[Pair]:
    """Perplexity, KL and agreement on one text."""
    change = f"{figure(text.ratio)}x{_error(text.ratio_error, '.4f')}"
    return [
        Pair("Perplexity", figure(text.dense_perplexity), figure(text.sparse_perplexity), change),
        Pair("KL to dense, nats a token", "", f"{figure(text.kl, 3)}{_error(text.kl_error, '.2g')}", ""),
        Pair("Same likeliest next token", "", per_cent(text.agreement, text.agreement_error), ""),
    ]


def task_pair(task: TaskResult) -> Pair:
    """One task; accuracies in per cent, other metrics in their own unit."""
    label = f"{task.name}, {task.metric}"
    if task.metric.startswith(("acc", "exact_match", "f1")):
        change = f"{100 * (task.sparse - task.dense):+.1f} points"
        return Pair(label, per_cent(task.dense, task.dense_error), per_cent(task.sparse, task.sparse_error), change)
    dense, sparse = (
        f"{figure(v)}{_error(e, '.2g')}" for v, e in ((task.dense, task.dense_error), (task.sparse, task.sparse_error))
    )
    return Pair(label, dense, sparse, f"{task.sparse - task.dense:+.4g}")


def _unit(speed: SpeedResult) -> str:
    """What one decode step is: a token of one sequence, or one of each sequence of the batch."""
    return "a token" if speed.batch == 1 else "a step"


def more(speed: SpeedResult) -> str:
    """How much more time a step takes that is slower than dense."""
    return f"{100 * (1 / speed.gain - 1):.{0 if speed.gain < 0.95 else 1}f} %"


def speed_pairs(s: SpeedResult) -> list[Pair]:
    """Time, bytes and gain of one decode step. What the reference runs saves nothing, and its row says so."""
    saved = s.kernel not in NOTHING_SAVED
    rates = [s.batch / seconds for seconds in (s.dense_seconds, s.sparse_seconds)]
    used = [count / seconds / s.read_bandwidth for count, seconds in
            ((s.dense_bytes, s.dense_seconds), (s.sparse_bytes, s.sparse_seconds))]  # fmt: skip
    fewer = f"{100 * (s.sparse_bytes / s.dense_bytes - 1):+.1f} %" if saved else "nothing is saved"
    by_kernel = " by a kernel" if s.kernel == "reference" else ""
    gain = f"{s.gain:.2f}x" if s.gain >= 1 else f"{s.gain:.2f}x: slower"
    over_stored = []
    if s.stored_dense_seconds is not None and s.stored_dense_bytes is not None:
        allowed = f"bytes allow {s.stored_dense_bytes / s.sparse_bytes:.2f}x"
        before = milliseconds(s.stored_dense_seconds)
        over_stored = [Pair("Gain over the same weights, dense", before, allowed, f"{s.gain_over_stored_dense:.2f}x")]
    return [
        Pair(f"Time {_unit(s)}", milliseconds(s.dense_seconds), milliseconds(s.sparse_seconds),
             f"{100 * (s.sparse_seconds / s.dense_seconds - 1):+.1f} %"),
        Pair("Tokens a second", figure(rates[0]), figure(rates[1]), f"{100 * (rates[1] / rates[0] - 1):+.1f} %"),
        Pair(f"Bytes {_unit(s)} reads", size(s.dense_bytes), size(s.sparse_bytes) + by_kernel, fewer),
        Pair("Gain that the bytes allow", "", "", f"{s.allowed_gain:.2f}x{by_kernel}"),
        Pair("Gain measured", "", "", gain),
        *over_stored,
        Pair("Share of read bandwidth", per_cent(used[0]), per_cent(used[1]) if saved else "", ""),
        Pair("Step, kernel", s.dense_variant, f"{s.sparse_variant}, {s.kernel}", ""),
    ]  # fmt: skip


def text_cost(text: TextResult) -> str:
    """What the sparse model loses on a text, for a sentence."""
    if not math.isfinite(text.ratio):
        return f"Perplexity on {text.source} is not a number"
    percent = f"{100 * abs(text.ratio - 1):.1f}{_error(100 * text.ratio_error, '.1f')} %"
    return f"Perplexity on {text.source} {'rises' if text.ratio >= 1 else 'falls'} by {percent}"


def speed_gain(s: SpeedResult) -> str:
    """What a step gains or loses, for a sentence."""
    times = f"{_unit(s)} takes {milliseconds(s.sparse_seconds)} instead of {milliseconds(s.dense_seconds)}"
    gain = f"slower than dense by {more(s)}" if s.gain < 1 else f"{s.gain:.2f}x as fast"
    verb = "would allow" if s.gain < 1 or s.kernel == "reference" else "allow"
    note = NOTHING_SAVED.get(s.kernel)
    end = f"; {note}" if note else ""
    return f"{times}: {gain}, where the bytes {verb} {s.allowed_gain:.2f}x{end}"


def budget(found: Budget) -> str:
    """A plan's target, and what came of it."""
    text = f"{found.target} by {found.allocate}: {figure(found.bytes, 3)} of the dense model's weights are read"
    if found.held_out is None:
        return text
    held = found.held_out
    ratio, kl = figure(held.perplexity_ratio), figure(held.kl, 3)
    return f"{text}; on {held.tokens} held-out tokens perplexity is {ratio} times the dense model's, KL {kl} nats"


def tie(text: str) -> str:
    """Keeps a unit and a standard error on the line of its number's end."""
    return re.sub(r"(?<=±) | (?=(?:%|ms|[kMGT]?B|points)(?:\W|$))", "\u00a0", text)
