"""Quality of several recipes beside the dense model, all on the same text and tasks, as one Markdown table.

    python benchmarks/quality.py --calibration valid.txt --text test.txt --tasks piqa-validation.jsonl
    python benchmarks/quality.py cats:sparsity=0.3 cats:sparsity=0.5 --calibration self --text a.txt --text b.jsonl
    python benchmarks/quality.py sandcat teal --target bytes=0.8 --target bytes=0.65 --text test.txt --plot bytes.svg

With targets, each recipe that has a sparsity is measured at each of them, and --plot draws perplexity against bytes.
Every token is computed sparsely. All recipes are calibrated on the same text, and are evaluated in one pass beside the
same dense model, so differences between rows are not noise of the text. Bytes are weights that one token reads.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from pathlib import Path

import sandcat
from sandcat import plots
from sandcat.benchmark import bytes_share
from sandcat.data import load_text, same_source
from sandcat.errors import BudgetError
from sandcat.evaluate import WINDOW, evaluate_text
from sandcat.plan import parse_recipe
from sandcat.progress import shown

RECIPES = [
    "relufy",
    *(f"cats:sparsity={s},score={score}" for s in (0.5, 0.7, 0.9) for score in ("activation", "output")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--target", action="append", default=[], help="as in sandcat.sparsify(target=...)")
    parser.add_argument("--allocate", help="how a target is spread")
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
    parser.add_argument("--json", type=Path, help="write all figures there too")
    options = parser.parse_args()
    with shown():
        table, figures = measure(options)
    print(table)
    if options.plot:
        svg = plots.quality({name: points(rows) for name, rows in by_recipe(figures).items()})
        options.plot.write_text(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" color="#75869a"', 1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def measure(options: argparse.Namespace) -> tuple[str, list[dict]]:
    dense, tokenizer = sandcat.load(options.model, device=options.device, dtype=options.dtype)
    variants = []
    for source in options.calibration or ["self"]:
        text = load_text(source, dense, tokenizer, tokens=options.calibration_tokens)
        for recipe, target in asked_for(options.recipes, options.target):
            model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})  # a copy that shares the weights
            try:
                allocate = options.allocate if target else None
                sandcat.sparsify(model, tokenizer, recipe, calibration=text, target=target, allocate=allocate)
            except BudgetError as error:
                print(f"{recipe}: {error}", file=sys.stderr)
                continue
            variants.append({
                "recipe": recipe, "target": target, "calibration": f"{Path(source).name}, {text.tokens} tokens",
                "model": model,
            })  # fmt: skip
    models = [variant["model"] for variant in variants]
    batches = [int(batch) for batch in options.batch.split(",")]
    variants = [{**variant, "batch": batch} for variant in variants for batch in batches]
    for source in options.text:
        if any(same_source(source, other) for other in options.calibration or ()):
            raise SystemExit(f"{source} is calibrated on: measure on another text")
        text = load_text(source, dense, tokenizer, tokens=options.tokens, window=WINDOW, seed=1)
        for place, batch in enumerate(batches):
            found = evaluate_text(dense, models, text, batch=batch)
            for variant, (result, realised) in zip(variants[place :: len(batches)], found, strict=True):
                variant.setdefault("text", []).append(dataclasses.asdict(result))
                variant.setdefault("realised", realised)
    if options.tasks:
        from sandcat.tasks import run_tasks

        found = run_tasks(dense, models, tokenizer, options.tasks.split(","), limit=options.limit)
        for variant, results in zip(variants[:: len(batches)], found, strict=True):
            variant["tasks"] = [dataclasses.asdict(result) for result in results]
    for variant in variants:
        variant["bytes"] = bytes_share(variant.pop("model"), variant["realised"])
    return markdown(variants), variants


def asked_for(recipes: list[str], targets: list[str]) -> list[tuple[str, str | None]]:
    """Each recipe at each target; without one, if there are none or it has no sparsity."""
    pairs = []
    for recipe in recipes:
        budgeted = targets and any(method.has_sparsity for method in parse_recipe(recipe))
        pairs += [(recipe, target) for target in (targets if budgeted else [None])]
    return pairs


def by_recipe(variants: list[dict]) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for variant in variants:
        rows.setdefault(variant["recipe"], []).append(variant)
    return rows


def points(variants: list[dict]) -> list[tuple[float, float]]:
    """Bytes and perplexity over dense on the first text; the dense model among them."""
    return sorted([(1.0, 1.0), *((v["bytes"], v["text"][0]["ratio"]) for v in variants)])


def markdown(variants: list[dict]) -> str:
    texts, tasks = variants[0].get("text", []), variants[0].get("tasks", [])
    head = ["recipe", "target", "calibration", "batch", "dropped", "bytes"]
    for text in texts:
        name = Path(text["source"]).name
        head += [f"perplexity, {name} (dense {text['dense_perplexity']:.2f})", "KL", "agreement"]
    head += [f"{t['name']} {t['metric']} (dense {t['dense']:.3f} ± {t['dense_error'] or 0:.3f})" for t in tasks]
    rows = [head, ["---"] * len(head)]
    for variant in variants:
        realised = variant["realised"].values()
        row = [
            f"`{variant['recipe']}`",
            variant["target"] or "",
            variant["calibration"],
            str(variant["batch"]),
            f"{sum(realised) / len(realised):.3f}" if realised else "",
            f"{variant['bytes']:.3f}",
        ]
        for text in variant.get("text", []):
            row += [
                f"x{text['ratio']:.3f} ± {text['ratio_error']:.3f}",
                f"{text['kl']:.3f} ± {text['kl_error']:.3f}",
                f"{text['agreement']:.3f} ± {text['agreement_error']:.3f}",
            ]
        row += [f"{task['sparse']:.3f} ± {task['sparse_error'] or 0:.3f}" for task in variant.get("tasks", [])]
        rows.append(row)
    tokens = ", ".join(f"{text['tokens']} tokens of {Path(text['source']).name}" for text in texts)
    examples = ", ".join(f"{task['examples']} examples of {task['name']}" for task in tasks)
    return (
        "\n".join(f"| {' | '.join(row)} |" for row in rows)
        + f"\n\nMeasured on {'; '.join(filter(None, [tokens, examples]))}."
    )


if __name__ == "__main__":
    main()
