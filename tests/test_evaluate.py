"""Quality figures against direct computation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import text, tiny

import sandcat
from sandcat.evaluate import evaluate_text, every_token_sparse, histograms, layer_sparsity
from sandcat.layers.sparse import sparse_modules
from sandcat.methods import Cats


@pytest.fixture
def pair():
    dense = tiny("llama")
    sparse = copy.deepcopy(dense)
    plan = sandcat.sparsify(sparse, None, Cats(sparsity=0.5, dense_prompt=True), calibration=text())
    return dense, sparse, plan


@torch.inference_mode()
def test_against_direct_computation(pair):
    dense, sparse, _ = pair
    words = text(512, 32, seed=9)
    ((found, _),) = evaluate_text(dense, [sparse], words)
    with every_token_sparse(sparse):
        p, q = (model(words.ids_NL).logits[:, :-1].log_softmax(-1) for model in (dense, sparse))
    target = words.ids_NL[:, 1:]
    losses = [F.nll_loss(x.flatten(0, 1), target.flatten(), reduction="none").view(target.shape) for x in (p, q)]
    assert found.tokens == target.numel()
    assert found.dense_perplexity == pytest.approx(math.exp(losses[0].mean()), rel=1e-5)
    assert found.sparse_perplexity == pytest.approx(math.exp(losses[1].mean()), rel=1e-5)
    assert found.ratio == pytest.approx(found.sparse_perplexity / found.dense_perplexity, rel=1e-6)
    change = (losses[1] - losses[0]).mean(1)
    assert found.ratio_error == pytest.approx(found.ratio * float(change.std()) / math.sqrt(len(change)), rel=1e-4)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), rel=1e-6)
    assert found.kl > 0.01 and found.ratio != 1


def test_a_model_against_itself(pair):
    dense, *_ = pair
    ((found, realised),) = evaluate_text(dense, [dense], text(256, 32))
    assert (found.ratio, found.kl, found.agreement, realised) == (1, 0, 1, {})


def test_every_token_is_sparse_even_with_dense_prompt(pair):
    """And the option is back afterwards."""
    dense, sparse, plan = pair
    ((_, realised),) = evaluate_text(dense, [sparse], text())
    for row in layer_sparsity(plan, realised):
        assert row.target == 0.5 and abs(row.realised - 0.5) < 0.05 and abs(row.calibrated - 0.5) < 0.005
    assert all(module.dense_prompt for module in sparse_modules(sparse).values())
    assert not any(m._forward_pre_hooks for m in sparse.modules())


def test_histograms_count_every_neuron_once(pair):
    _, sparse, _ = pair
    sites = list(sparse_modules(sparse))
    words = text(256, 64)
    with every_token_sparse(sparse):
        for row in histograms(sparse, words.ids_NL, sites):
            total = sum(row.kept) + sum(row.dropped)
            assert total == 256 * 72
            assert sum(row.dropped) / total == pytest.approx(0.5, abs=0.06)
            assert row.threshold_low == row.threshold == row.threshold_high
            assert len(row.log10_edges) == len(row.kept) + 1
