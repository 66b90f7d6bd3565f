"""A sparse model split over two processes by transformers: the same logits, half of the weights each."""

from __future__ import annotations

import pytest
import split
import torch
from conftest import DEVICES, relative_error
from launch import TORCHRUN, launch
from tiny import text, tiny, tokenizer

import sandcat

CASES = {
    "cats": ("llama", "cats"),
    "teal": ("llama", "teal:sparsity=0.3,sites=all+head"),
    "tied": ("llama", "teal:sparsity=0.3,sites=all+head"),
    "both": ("qwen3", "teal:sparsity=0.3,sites=[q,k,v,o,gate] cats:sparsity=0.3"),
    "int8": ("llama", "int8 teal:sparsity=0.3,sites=[q,k,v,o] cats:sparsity=0.3"),
    "rsparse": ("llama", "rsparse:sparsity=0.3,alpha=[0.7]"),
    "fused": ("phi3", "cats"),
    "fused inputs": ("phi3", "teal:sparsity=0.3"),
    "int8 alone": ("llama", "int8"),
    "coreinfer": ("llama", "coreinfer"),
    "shared": ("llama", "cats:batch=shared"),
}


@pytest.fixture(scope="module", params=DEVICES)
def cases(request, tmp_path_factory):
    """For each case what the whole model gives, and what two processes found."""
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    root = tmp_path_factory.mktemp("split")
    want, folders = {}, {}
    for name, (family, recipe) in CASES.items():
        model = tiny(family, tie_word_embeddings=name == "tied")
        sandcat.sparsify(model, None, recipe, calibration=text())
        folders[name] = sandcat.save(model, tokenizer(), root / name.replace(" ", "-"))
        want[name] = {"outputs": split.outputs(model), "bytes": split.held(model)}
    launch(TORCHRUN, split.__file__, *map(str, folders.values()), gpus=request.param == "cuda")
    return {n: (want[n], [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]) for n, folder in folders.items()}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("coreinfer", "shared")])
def test_the_same_from_half_of_the_weights(name, cases):
    want, parts = cases[name]
    for found in parts:
        assert "error" not in found, found
        for one, other in zip(found["outputs"][:-1], want["outputs"][:-1], strict=True):
            assert relative_error(one, other) < 1e-5
        assert torch.equal(found["outputs"][-1], want["outputs"][-1])
        assert found["bytes"] < 0.55 * want["bytes"]
        assert "save the whole one" in found["saving"]


@pytest.mark.parametrize("name", ["coreinfer", "shared"])
def test_what_looks_at_all_units_is_refused(name, cases):
    for found in cases[name][1]:
        assert "tensor parallelism" in found["error"]
