"""Quality of several recipes beside the dense model, all on the same text and tasks, as one Markdown table.

    python benchmarks/quality.py --calibration valid.txt --text test.txt --tasks piqa-validation.jsonl
    python benchmarks/quality.py cats:sparsity=0.3 cats:sparsity=0.5 --calibration self --text a.txt --text b.jsonl

Every token is computed sparsely. All recipes are calibrated on the same text, and are evaluated in one pass beside the
same dense model, so differences between rows are not noise of the text. Bytes are weights that one token reads.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import sandcat
from sandcat.benchmark import bytes_share
from sandcat.data import load_text, same_source
from sandcat.evaluate import WINDOW, evaluate_text
from sandcat.progress import shown

RECIPES = [
    "relufy",
    *(f"cats:sparsity={s},score={score}" for s in (0.5, 0.7, 0.9) for score in ("activation", "output")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--calibration", action="append", help="each recipe is calibrated on each of them")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there too")
    options = parser.parse_args()
    with shown():
        table, figures = measure(options)
    print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def measure(options: argparse.Namespace) -> tuple[str, list[dict]]:
    dense, tokenizer = sandcat.load(options.model, device=options.device, dtype=options.dtype)
    variants = []
    for source in options.calibration or ["self"]:
        text = load_text(source, dense, tokenizer, tokens=options.calibration_tokens)
        for recipe in options.recipes:
            # A copy that shares the weights; only layouts and thresholds are its own.
            model = copy.deepcopy(dense, {id(p): p for name, p in dense.named_parameters() if "down" not in name})
            sandcat.sparsify(model, tokenizer, recipe, calibration=text)
            variants.append(
                {"recipe": recipe, "calibration": f"{Path(source).name}, {text.tokens} tokens", "model": model}
            )
    models = [variant["model"] for variant in variants]
    for source in options.text:
        if any(same_source(source, other) for other in options.calibration or ()):
            raise SystemExit(f"{source} is calibrated on: measure on another text")
        text = load_text(source, dense, tokenizer, tokens=options.tokens, window=WINDOW, seed=1)
        for variant, (result, realised) in zip(variants, evaluate_text(dense, models, text), strict=True):
            variant.setdefault("text", []).append(dataclasses.asdict(result))
            variant.setdefault("realised", realised)
    if options.tasks:
        from sandcat.tasks import run_tasks

        found = run_tasks(dense, models, tokenizer, options.tasks.split(","), limit=options.limit)
        for variant, results in zip(variants, found, strict=True):
            variant["tasks"] = [dataclasses.asdict(result) for result in results]
    for variant in variants:
        variant["bytes"] = bytes_share(variant.pop("model"), variant["realised"])
    return markdown(variants), variants


def markdown(variants: list[dict]) -> str:
    texts, tasks = variants[0].get("text", []), variants[0].get("tasks", [])
    head = ["recipe", "calibration", "dropped", "bytes"]
    for text in texts:
        name = Path(text["source"]).name
        head += [f"perplexity, {name} (dense {text['dense_perplexity']:.2f})", "KL", "agreement"]
    head += [f"{t['name']} {t['metric']} (dense {t['dense']:.3f} ± {t['dense_error'] or 0:.3f})" for t in tasks]
    rows = [head, ["---"] * len(head)]
    for variant in variants:
        realised = variant["realised"].values()
        row = [
            f"`{variant['recipe']}`",
            variant["calibration"],
            f"{sum(realised) / len(realised):.3f}",
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
