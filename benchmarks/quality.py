"""Quality of several recipes beside the dense model, all on the same text and tasks, as one Markdown table.

    python benchmarks/quality.py --calibration valid.txt --text test.txt --tasks piqa-validation.jsonl --plot plot.svg
    python benchmarks/quality.py cats:sparsity=0.3 cats:sparsity=0.5 --calibration self --text a.txt --text b.jsonl
    python benchmarks/quality.py sandcat teal@uniform --target bytes=0.8 --target bytes=0.65 --text test.txt

Without recipes it is every method at three budgets. With targets, each recipe with a sparsity is measured at each of
them; RECIPE@WAY says how a target is spread over the sites (see docs/budgets.md). Every token is computed sparsely, and
all recipes are calibrated on the same text; rows of one recipe are measured in one pass. Bytes are weights that one
token reads. With --out a row that was measured is kept in that file, and isn't measured again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
from pathlib import Path

import sandcat
from sandcat.data import load_text, same_source
from sandcat.errors import BudgetError
from sandcat.measuring.bytes_read import bytes_share
from sandcat.measuring.quality import WINDOW, evaluate_text
from sandcat.measuring.tasks import run_tasks
from sandcat.plans.recipe import parse_recipe
from sandcat.reports import plots
from sandcat.support.progress import shown

RECIPES = [
    "sandcat", "teal@uniform", "teal:sites=[q,k,v,o,gate] cats:score=output@uniform", "rsparse@uniform", "cats@uniform",
    "coreinfer@uniform", "relufy",
]  # fmt: skip
TARGETS = ["bytes=0.8", "bytes=0.65", "bytes=0.5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help=f"default: {', '.join(RECIPES)}, at {', '.join(TARGETS)}")
    parser.add_argument("--target", action="append", default=[], help="as in sandcat.sparsify(target=...)")
    parser.add_argument("--plot", type=Path, help="write perplexity against bytes there, as SVG")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--calibration", action="append", help="each recipe is calibrated on each of them")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--batch", default="1", help="read so many windows in lockstep, each size in turn")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, help="keep each row there, one JSON object a line; also all figures")
    options = parser.parse_args()
    for source in options.text:
        if any(same_source(source, other) for other in options.calibration or ()):
            raise SystemExit(f"{source} is calibrated on: measure on another text")
    with shown():
        rows = kept(options, asked_for(options))
    print(markdown(rows))
    if options.plot:
        svg = plots.quality({name: points(rows) for name, rows in by_recipe(rows).items()})
        options.plot.write_text(str(svg).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" color="#75869a"', 1))


def asked_for(options: argparse.Namespace) -> list[dict]:
    """What makes a row: every recipe at every target, on every calibration text, and what it is measured on."""
    recipes, targets = options.recipes or RECIPES, options.target or ([] if options.recipes else TARGETS)
    same = {name: getattr(options, name) for name in ("model", "dtype", "calibration_tokens", "tokens", "limit")}
    same |= {"texts": [Path(text).name for text in options.text], "batches": options.batch, "task_names": options.tasks}
    found = []
    for source in options.calibration or ["self"]:
        for word in recipes:
            recipe, _, how = word.partition("@")
            budgeted = targets and any(method.has_sparsity for method in parse_recipe(recipe))
            for target in targets if budgeted else [None]:
                way = {"recipe": recipe, "target": target, "allocate": how or None}
                found.append({**way, "calibrated_on": Path(source).name, **same})
    return found


def kept(options: argparse.Namespace, asked: list[dict]) -> list[dict]:
    """The rows as --out has them; what it lacks is measured, recipe by recipe, and added to it."""
    lines = options.out.read_text().splitlines() if options.out and options.out.exists() else []
    rows = [json.loads(line) for line in lines]
    for name in dict.fromkeys(name_of(wanted) for wanted in asked):
        missing = [w for w in asked if name_of(w) == name and w not in [row["wanted"] for row in rows]]
        found = measure(options, missing) if missing else []
        rows += found
        if options.out:
            with options.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    return [row for wanted in asked for row in rows if row["wanted"] == wanted]


def measure(options: argparse.Namespace, asked: list[dict]) -> list[dict]:
    """A row for each batch of each that is asked for; or the reason why a recipe cannot have a target."""
    dense, tokenizer = sandcat.load(options.model, device=options.device, dtype=options.dtype)
    sources = {Path(source).name: source for source in options.calibration or ["self"]}
    refused, made = [], []
    for wanted in asked:
        text = load_text(sources[wanted["calibrated_on"]], dense, tokenizer, tokens=options.calibration_tokens)
        row = {"wanted": wanted, "calibration": f"{wanted['calibrated_on']}, {text.tokens} tokens"}
        model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})  # a copy that shares the weights
        try:
            plan = sandcat.sparsify(
                model,
                tokenizer,
                wanted["recipe"],
                calibration=text,
                target=wanted["target"],
                allocate=wanted["allocate"],
            )
            made.append((row | {"plan": plan.to_json()}, model))
        except BudgetError as error:
            refused.append(row | {"error": str(error)})
    if not made:
        return refused
    models, rows = [model for _, model in made], []
    for batch in map(int, options.batch.split(",")):
        several = [row | {"batch": batch, "text": [], "tasks": []} for row, _ in made]
        for source in options.text:
            text = load_text(source, dense, tokenizer, tokens=options.tokens, window=WINDOW, seed=1)
            for row, (result, realised) in zip(several, evaluate_text(dense, models, text, batch=batch), strict=True):
                row["text"].append(dataclasses.asdict(result))
                row.setdefault("realised", realised)
        rows += several
    for row, model in zip(rows, models * len(rows), strict=False):
        row["bytes"] = bytes_share(model, row["realised"])
    if options.tasks:
        found = run_tasks(dense, models, tokenizer, options.tasks.split(","), limit=options.limit)
        for row, results in zip(rows, found, strict=False):  # those of the first batch
            row["tasks"] = [dataclasses.asdict(result) for result in results]
    return refused + rows


def name_of(wanted: dict) -> str:
    return wanted["recipe"] if wanted["allocate"] is None else f"{wanted['recipe']}@{wanted['allocate']}"


def by_recipe(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each recipe, by the names of its methods alone where these tell recipes apart."""
    names = {name_of(row["wanted"]): re.sub(r":\S*|@\w+", "", name_of(row["wanted"])) for row in rows}
    found: dict[str, list[dict]] = {}
    for row in rows:
        name = name_of(row["wanted"])
        short = names[name] if list(names.values()).count(names[name]) == 1 else name
        if "error" not in row:
            found.setdefault(short, []).append(row)
    return found


def points(rows: list[dict]) -> list[tuple[float, float]]:
    """Bytes and perplexity over dense on the first text; the dense model among them."""
    return sorted([(1.0, 1.0), *((row["bytes"], row["text"][0]["ratio"]) for row in rows)])


def markdown(rows: list[dict]) -> str:
    """One table of all rows. Columns in which they do not differ are said below it."""
    measured = [row for row in rows if "error" not in row]
    texts, tasks = measured[0]["text"], measured[0]["tasks"]
    columns = [name for name in ("calibration", "batch") if len({row.get(name) for row in measured}) > 1]
    head = ["recipe", "target", *columns, "dropped", "bytes"]
    for text in texts:
        head += [f"perplexity, {Path(text['source']).name}", "KL, nats", "same likeliest token"]
    head += [f"{task['name']}, {task['metric']}" for task in tasks]
    dense = ["dense", "", *("" for _ in columns), "0", "1.000"]
    for text in texts:
        dense += [f"{text['dense_perplexity']:.2f}", "0", "1"]
    dense += [f"{task['dense']:.3f} ± {task['dense_error'] or 0:.3f}" for task in tasks]
    lines = [head, ["---"] * len(head), dense]
    for row in rows:
        line = [
            f"`{name_of(row['wanted'])}`",
            row["wanted"]["target"] or "",
            *(str(row.get(name, "")) for name in columns),
        ]
        if "error" in row:
            line += [row["error"].partition(". ")[0], *[""] * (len(head) - len(line) - 1)]
        else:
            line += figures(row, texts)
        lines.append(line)
    tokens = ", ".join(f"{text['tokens']} tokens of {Path(text['source']).name}" for text in texts)
    examples = ", ".join(f"{task['examples']} examples of {task['name']}" for task in tasks)
    said = "; ".join(filter(None, [tokens, examples])) + f". Calibrated on {measured[0]['calibration']}."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\nMeasured on {said}"


def figures(row: dict, texts: list[dict]) -> list[str]:
    dropped = row["realised"].values()
    found = [f"{sum(dropped) / len(dropped):.3f}" if dropped else "", f"{row['bytes']:.3f}"]
    for text, usual in zip(row["text"], texts, strict=True):
        part = "" if text["prompt"] == usual["prompt"] else f" of {text['dense_perplexity']:.2f}, after a prompt"
        found += [
            f"x{text['ratio']:.3f} ± {text['ratio_error']:.3f}{part}",
            f"{text['kl']:.3f} ± {text['kl_error']:.3f}",
            f"{text['agreement']:.3f} ± {text['agreement_error']:.3f}",
        ]
    return found + [f"{task['sparse']:.3f} ± {task['sparse_error'] or 0:.3f}" for task in row["tasks"]]


if __name__ == "__main__":
    main()
