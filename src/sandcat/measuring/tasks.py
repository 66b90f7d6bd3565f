"""Tasks of lm-eval: the sparse model beside the dense one, on the same examples, with every token computed sparsely."""

from __future__ import annotations

import copy
import io
import json
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from sandcat.errors import DataError, suggest
from sandcat.layers.modes import chooses_in_prompt, every_token_sparse
from sandcat.support.progress import track

PAPER_TASKS = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq", "sciq")
"""The eight tasks of the CATS paper (arXiv 2404.08763), which the name "paper" stands for."""

LAYOUTS = {
    ("goal", "sol1", "sol2", "label"): ("Question: {goal}\nAnswer:", ("sol1", "sol2"), "label"),
    ("query", "choices", "gold"): ("{query}", ("choices",), "gold"),
}
"""Columns of a local file of questions -> the prompt; the columns of the choices, or the one with a list of them; the
column with the number of the right one, from 0. The first row is lm-eval's own `piqa`."""
COLUMNS = " or ".join(", ".join(columns) for columns in LAYOUTS)

FILES = (".jsonl", ".json", ".yaml", ".yml")


@dataclass(frozen=True)
class TaskResult:
    """Dense against sparse on one task, or on a group of tasks that lm-eval sums up in one figure."""

    name: str
    """As lm-eval calls it; for a local file of questions, the file's name."""
    metric: str
    """acc and acc_norm are shares of right answers, in [0, 1]; others have lm-eval's own units."""
    examples: int
    dense: float
    dense_error: float | None
    """Standard error as lm-eval gives it; None where it gives none (a single example, a perplexity of words)."""
    sparse: float
    sparse_error: float | None


def run_tasks(
    dense: nn.Module, sparse: Sequence[nn.Module], tokenizer, names: list[str] | dict[str, dict], *,
    limit: int | None = None, shots: int = 0, batch_size: int = 8, seed: int = 0,
) -> list[list[TaskResult]]:  # fmt: skip
    """Runs all models on each task; the results of each sparse model. Names and files are checked before a model runs.

    The metric is `acc` for the paper's eight by name, because its code averages that; otherwise `acc_norm` (choices
    compared by log-likelihood a character) where the task has it, else `acc`, else the task's first metric with a
    standard error, else its first. A group with a figure of its own (mmlu) is one row, another group one row a task.

    Args:
        names: what `load_tasks` takes, or what it gave.
        limit: the first so many examples of each task (of each member of a group); default all.
        shots: solved examples before each question. A task whose own definition says 0 keeps 0.
        batch_size: sequences a forward.
        seed: chooses the solved examples.

    Raises:
        DataError: what `load_tasks` raises, numbers below 1 (shots: 0), and token ids beyond the models' vocabulary.
    """
    if shots < 0 or batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"limit={limit}, shots={shots}, batch_size={batch_size}: give at least 1 (shots: 0).")
    loaded = names if isinstance(names, dict) else load_tasks(names, shots=shots)
    from lm_eval.evaluator import evaluate

    from sandcat.lm_eval_model import AfterPrompts, Exact, over_processes

    results: list[list[TaskResult]] = [[] for _ in sparse]
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        for model in sparse:
            stack.enter_context(every_token_sparse(model))
        # a copy of the tokenizer, since lm-eval sets padding in it
        settings = {"tokenizer": copy.deepcopy(tokenizer), "batch_size": batch_size, "softmax_dtype": "float32"}
        makers = [AfterPrompts if chooses_in_prompt(model) else Exact for model in (dense, *sparse)]
        models = [make(model, **settings) for make, model in zip(makers, (dense, *sparse), strict=True)]
        for name, found in loaded.items():
            tasks, figures = found["tasks"].values(), []
            for which, model in enumerate(models):
                for task in tasks:
                    task.set_fewshot_seed(seed)
                    if task.get_config("num_fewshot") != 0:
                        task.set_config(key="num_fewshot", value=shots)
                with closing(_bar(tasks, f"{Path(name).name}, {'sparse' if which else 'dense'}")) as bar:
                    over_processes(model)
                    # lm-eval offers every answer to its cache
                    model.set_cache_hook(SimpleNamespace(add_partial=lambda *_, bar=bar: next(bar, None)))
                    done = evaluate(model, found, limit=limit, log_samples=False, bootstrap_iters=1000)
                    figures.append(done["results"])
            for row in _reported(found, figures[0]):
                for rows, own in zip(results, figures[1:], strict=True):
                    rows.append(_result(row, figures[0][row], own[row]))
    return results


def load_tasks(names: Sequence[str], *, shots: int = 0) -> dict[str, dict]:
    """The tasks of each name with their data, as `TaskManager.load` gives them; to check early, without a model.

    Args:
        names: lm-eval task, group or tag names; "paper" for `PAPER_TASKS`; paths of .jsonl or .json files in one of
            `LAYOUTS`; paths of lm-eval's .yaml task files.
        shots: as in `run_tasks`.

    Raises:
        DataError: lm-eval is missing, a name is unknown, a file is no task, or a task's data cannot be loaded.
    """
    try:
        from lm_eval.tasks.manager import TaskManager
    except ImportError as error:
        raise DataError(f"tasks need lm-eval 0.4.12 or newer ({error}): pip install sandcat[eval].") from None
    names = list(dict.fromkeys(part for name in names for part in (PAPER_TASKS if name == "paper" else (name,))))
    paths = {name: _file(name) for name in names if name.startswith((".", "/", "~")) or Path(name).suffix in FILES}
    questions = {name: _questions(path, shots) for name, path in paths.items() if path.suffix.startswith(".js")}
    with _quiet():
        manager = TaskManager(include_defaults=len(questions) < len(names))  # the list of lm-eval's tasks takes seconds
        for name in names:
            if name not in paths and name not in manager.task_index:
                close, ends = suggest(name, manager.all_tasks), ", ".join(FILES)
                raise DataError(f"lm-eval has no task {name!r}{close} Files of your own end in {ends}.")
        return {name: _load(manager, name, questions.get(name) or paths.get(name)) for name in names}


def _load(manager, name: str, local: dict | Path | None) -> dict:
    try:
        found = manager.load([local if isinstance(local, dict) else str(local or name)])
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        hint = (
            "The file must describe one task." if local else
            "Tasks by name take their data from the Hugging Face hub, or from its cache on this machine. Without "
            f"network, give a local file of questions with the columns {COLUMNS}."
        )  # fmt: skip
        raise DataError(f"the task {name!r} cannot be loaded ({reason}). {hint}") from error
    if any(getattr(task, flag, False) for task in found["tasks"].values() for flag in ("UNSAFE_CODE", "MULTIMODAL")):
        raise DataError(f"{name!r} runs code that the model writes, or needs images or sound: not supported.")
    return found


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix not in FILES or not path.is_file():
        raise DataError(f"there is no task file {name!r}: it must exist, and end in {', '.join(FILES)}.")
    return path


def _questions(path: Path, shots: int) -> dict:
    """lm-eval's configuration for a file of multiple-choice questions."""
    from datasets import Dataset

    rows = _rows(path)
    columns = next((columns for columns in LAYOUTS if rows[0].keys() >= set(columns)), None)
    if columns is None:
        raise DataError(
            f"{str(path)!r} has the columns {', '.join(rows[0]) or '(none)'}, which are no known layout of questions. "
            f"Known: {COLUMNS}. Rename the columns, or describe the file in an lm-eval .yaml file."
        )
    if shots >= len(rows):
        raise DataError(f"{str(path)!r} has {len(rows)} questions: too few for {shots} solved ones before another.")
    prompt, which, right = LAYOUTS[columns]
    questions = []
    for number, row in enumerate(rows, 1):
        found = [row.get(column) for column in which]
        choices, answer = found[0] if isinstance(found[0], list) else found, row.get(right)
        texts = [row.get(column) for column in columns if column not in (*which, right)] + choices
        good = len(choices) > 1 and all(isinstance(text, str) for text in texts) and all(map(str.strip, choices))
        if not (good and type(answer) is int and 0 <= answer < len(choices)):
            raise DataError(
                f"question {number} of {str(path)!r} is not multiple choice: it needs text, two or more choices that "
                f"are not blank, and in {right!r} the number of the right one, counted from 0. It is "
                f"{json.dumps(row)[:200]}."
            )
        questions.append({"query": prompt.format(**row), "choices": choices, "gold": answer})
    data = Dataset.from_list(questions)
    return {
        "task": path.name, "custom_dataset": lambda **_: {"test": data}, "test_split": "test", "fewshot_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }  # fmt: skip


def _rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, or of a .json file that holds a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read as text ({error}).") from None
    rows = []
    for number, piece in enumerate([text] if path.suffix == ".json" else text.split("\n"), 1):
        try:
            found = json.loads(piece) if piece.strip() else []
        except ValueError as error:
            raise DataError(f"{str(path)!r} is not JSON (from line {number}: {error}).") from None
        rows += found if isinstance(found, list) else [found]
    if not rows:
        raise DataError(f"{str(path)!r} is empty: no questions in it.")
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{str(path)!r} holds something other than rows with the columns {COLUMNS}.")
    return rows


def _reported(found: dict, figures: dict[str, dict]) -> list[str]:
    """The groups with a figure of their own, and the tasks that are in none of them."""
    inner = set()
    for group in found["groups"].values():
        if group.has_aggregation:
            inner |= {part.name for part in group.get_all_groups()} | {task.task_name for task in group.get_all_tasks()}
    return [name for name, values in figures.items() if name not in inner and _keys(values)]


def _keys(figures: dict) -> list[str]:
    """The metrics among lm-eval's figures, which it keys "metric,filter" and "metric_stderr,filter"."""
    return [key for key in figures if "," in key and "_stderr," not in key]


def _error(figures: dict, key: str) -> float | None:
    error = figures.get("_stderr,".join(key.split(",", 1)))
    return None if error is None or isinstance(error, str) else float(error)


def _result(name: str, dense: dict, sparse: dict) -> TaskResult:
    wanted = ["acc,none"] if name in PAPER_TASKS else ["acc_norm,none", "acc,none"]
    measured = [key for key in _keys(dense) if _error(dense, key) is not None]
    key = next(key for key in (*wanted, *measured, *_keys(dense)) if key in dense)
    return TaskResult(
        name, key.removesuffix(",none"), dense["sample_len"], float(dense[key]), _error(dense, key),
        float(sparse[key]), _error(sparse, key),
    )  # fmt: skip


def _bar(tasks, description: str) -> Generator[int, None, None]:
    """One step an answer. Its length is read at the first one, when lm-eval has made its requests."""
    yield from track(range(sum(len(task.instances) for task in tasks)), description)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the bars, prints and warnings of lm-eval and of the libraries that it loads data with."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels, start = [logger.level for logger in loggers], tqdm.__init__
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # some of lm-eval's bars have no option; all of them are of this class
    tqdm.__init__ = lambda self, *args, **options: start(self, *args, **{**options, "disable": True})
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = start
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
