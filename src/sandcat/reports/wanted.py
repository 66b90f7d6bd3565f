"""What a report has to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sandcat.data import Text, check_ids, load_text, same_source
from sandcat.decoding.generate import prompt_ids
from sandcat.defaults import EVALUATION_TEXT, EVALUATION_TOKENS
from sandcat.errors import BadRecipe, DataError
from sandcat.measuring.quality import WINDOW
from sandcat.measuring.tasks import load_tasks
from sandcat.method import Method
from sandcat.plans.plan import Calibration


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a report has to hold. What is not asked for is left out of it."""

    texts: Sequence[str | Text] = (EVALUATION_TEXT,)
    """To measure perplexity on: sources as in `data.load_text`, none of them the calibration text; or what it gave."""
    tokens: int = EVALUATION_TOKENS
    """Of each text."""
    tasks: Sequence[str] | dict[str, dict] = ()
    """Names, or what `tasks.load_tasks` gave."""
    limit: int | None = None
    """Questions of each task; as in `tasks.run_tasks`."""
    speed: bool = True
    """Time decode steps, in the first of several processes."""
    batches: Sequence[int] = (1,)
    """Sequences at once: of a decode step that is timed, and of an evaluation as in `evaluate_text`."""
    context: int = 128
    """Tokens in the cache of a step that is timed; and as in `speed.benchmark`: `steps` a run, `runs`, `compile`."""
    steps: int = 20
    runs: int = 7
    compile: bool = True
    curve: Sequence[Method] = ()
    """The plan's method with other options, to measure the quality of, each calibrated on `curve_text`; see
    `at_sparsities`."""
    curve_text: Text | None = None
    prompts: Sequence[str] = ()
    """Written on by both models."""
    seed: int = 0
    command: str | None = None
    """What prints the report again."""

    def questions(self) -> dict[str, dict]:
        """The tasks, loaded.

        Raises:
            DataError: as `tasks.load_tasks`.
        """
        if isinstance(self.tasks, dict):
            return self.tasks
        return load_tasks(self.tasks) if self.tasks else {}

    def loaded(self, model: nn.Module, tokenizer) -> Wanted:
        """The same with its texts loaded; what the model writes to be measured on is not what it wrote for calibration.

        Raises:
            DataError: as `data.load_text`; or a prompt that cannot be read.
        """
        for prompt in self.prompts:
            prompt_ids(model, tokenizer, prompt)
        texts = [
            text
            if isinstance(text, Text)
            else load_text(text, model, tokenizer, tokens=self.tokens, window=WINDOW, seed=self.seed + 1)
            for text in self.texts
        ]
        for text in texts:
            check_ids(text.ids_NL, model, text.source)
        return dataclasses.replace(self, texts=texts)

    def check_apart(self, calibration: Calibration | Text | None) -> None:
        """
        Raises:
            DataError: one of the texts is the one that the plan was calibrated on.
        """
        for text in self.texts:
            source = text.source if isinstance(text, Text) else text
            if calibration is not None and same_source(source, calibration.source):
                raise DataError(f"{source!r} is the text that the plan was calibrated on: measure on another one.")


def at_sparsities(methods: Sequence[Method], sparsities: Sequence[float]) -> list[Method]:
    """The recipe's only method at other sparsities, for `Wanted.curve`.

    Raises:
        BadRecipe: several methods, one without the option `sparsity`, or a sparsity outside its range.
    """
    if sparsities and (len(methods) != 1 or "sparsity" not in methods[0].options()):
        raise BadRecipe(
            f"--curve needs a recipe of one method with the option sparsity, not {' '.join(map(str, methods))}."
        )
    return [methods[0].at(sparsity) for sparsity in sparsities]
