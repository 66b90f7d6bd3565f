"""What each of several processes runs in tests/support/test_processes.py: python several.py WHAT FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny import text, tiny, tokenizer

import sandcat
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring.quality import evaluate_text
from sandcat.measuring.tasks import run_tasks
from sandcat.support import processes

RECIPES = {
    "cats": "cats:score=output",
    "teal": "teal",
    "int8": "int8:clip=search cats",
    "rsparse": "rsparse:sparsity=0.3",
    "coreinfer": "coreinfer:rule=similarity,clusters=3",
    "one batch": "teal",
}


def calibrated(recipe: str) -> dict:
    """Plan and tensors of a model calibrated on eight batches (or one, which is too few to share)."""
    model = tiny("llama")
    words = text(512 if recipe == "one batch" else 8 * 4096)
    plan = sandcat.sparsify(model, None, RECIPES[recipe], calibration=words)
    return {"plan": plan.to_json(), "weights": model.state_dict()}


def budget() -> dict:
    model = tiny("llama")
    plan = sandcat.sparsify(model, None, "sandcat", target="bytes=0.8", calibration=text(4 * 4096))
    return {"plan": plan.to_json(), "weights": model.state_dict()}


def self_written() -> dict:
    model = tiny("llama")
    plan = sandcat.sparsify(model, tokenizer(), "cats", calibration_tokens=512)
    return {"plan": plan.to_json(), "weights": model.state_dict()}


def evaluated(folder: Path) -> dict:
    dense, sparse = tiny("llama"), tiny("llama")
    sandcat.sparsify(sparse, None, "cats", calibration=text())
    found = {f"batch {n}": evaluate_text(dense, [sparse], text(704, seed=6), batch=n) for n in (1, 2)}
    with torch.inference_mode():
        found["tasks"] = run_tasks(dense, [sparse], tokenizer(), [str(folder / "questions.jsonl")], batch_size=1)
    assert sparse_modules(sparse)
    return found


def main(folder: Path) -> None:
    with processes.together():
        found = {"rank": processes.rank(), "evaluated": evaluated(folder), "budget": budget(), "self": self_written()}
        found |= {recipe: calibrated(recipe) for recipe in RECIPES}
        print("printed")
        torch.save(found, folder / f"{processes.count()}-{processes.rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
