"""Quality figures against direct computation."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from tiny import text, tiny

import sandcat
from sandcat.errors import DataError
from sandcat.layers.modes import every_token_sparse, prompt_of
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring.quality import evaluate_text
from sandcat.measuring.sparsity import histograms, layer_sparsity
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


SHARED = ["cats:batch=shared", "teal:batch=shared", "teal:sites=[q,k,v,o,gate],batch=shared cats:batch=shared"]


@pytest.mark.usefixtures("kernels_pay")
@pytest.mark.parametrize("recipe", SHARED)
@torch.inference_mode()
def test_lockstep_is_what_decoding_gives(recipe):
    """Position by position the sequences share what they share in decode steps."""
    dense = tiny("llama")
    sparse = copy.deepcopy(dense)
    sandcat.sparsify(sparse, None, recipe, calibration=text())
    ids = text(3 * 12, 12, seed=3).ids_NL
    with every_token_sparse(sparse, lockstep=True):
        found = sparse(ids).logits
    with prompt_of(sparse, 0):  # as if the first token had been decoded too
        cache = sparse(ids[:, :1]).past_key_values
    steps = [sparse(ids[:, i : i + 1], past_key_values=cache).logits for i in range(1, 12)]
    assert_close(found[:, 1:], torch.cat(steps, 1), torch.float32)
    assert (found - sparse(ids).logits).norm() > 0.05 * found.norm()  # which is what each sequence gives alone


@torch.inference_mode()
def test_a_batch_of_windows(pair):
    """Windows far apart go together; with lists of their own it does not matter which."""
    dense, sparse, _ = pair
    words = text(7 * 32, 32, seed=9)
    shared = copy.deepcopy(dense)
    sandcat.sparsify(shared, None, Cats(sparsity=0.5, batch="shared"), calibration=text())
    (found, realised), (own, own_realised) = evaluate_text(dense, [shared, sparse], words, batch=3)
    assert found.batch == own.batch == 3 and found.tokens == own.tokens == 6 * 31
    ((alone, _),) = evaluate_text(dense, [sparse], text(7 * 32, 32, seed=9).part(0, 6))
    assert own.kl == pytest.approx(alone.kl, rel=1e-5) and own.ratio == pytest.approx(alone.ratio, rel=1e-5)
    with every_token_sparse(shared, lockstep=True):
        q = torch.cat([shared(words.ids_NL[i:6:2]).logits[:, :-1].log_softmax(-1) for i in (0, 1)])
    p = torch.cat([dense(words.ids_NL[i:6:2]).logits[:, :-1].log_softmax(-1) for i in (0, 1)])
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.kl > 1.2 * own.kl
    for site, share in realised.items():  # as long as the lists of one sequence, on average
        assert share == pytest.approx(own_realised[site], abs=0.05)
    alone = shared(words.ids_NL[:2]).logits  # afterwards prompts share nothing
    assert_close(alone, torch.cat([shared(words.ids_NL[i : i + 1]).logits for i in (0, 1)]), torch.float32)
    with pytest.raises(DataError, match="a batch of 8 needs as many windows"):
        evaluate_text(dense, [shared], words, batch=8)


def test_a_model_against_itself(pair):
    dense, *_ = pair
    ((found, realised),) = evaluate_text(dense, [dense], text(256, 32))
    assert (found.ratio, found.kl, found.agreement, realised) == (1, 0, 1, {})


def test_every_token_is_sparse_even_with_dense_prompt(pair):
    """And it is as it was afterwards."""
    dense, sparse, plan = pair
    hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in sparse.modules()]
    ((_, realised),) = evaluate_text(dense, [sparse], text())
    for row in layer_sparsity(plan, realised):
        assert row.target == 0.5 and abs(row.realised - 0.5) < 0.05 and abs(row.calibrated - 0.5) < 0.005
    assert all(module.dense_prompt for module in sparse_modules(sparse).values())
    assert hooks == [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in sparse.modules()]
    with torch.inference_mode():
        assert_close(sparse(text().ids_NL[:1]).logits, dense(text().ids_NL[:1]).logits, torch.float32)


@torch.inference_mode()
def test_what_is_told_ends_with_its_context_and_is_of_its_thread(pair):
    """However it ends, within another one, and whatever another thread does meanwhile."""
    dense, sparse, _ = pair
    ids = text(64, 32).ids_NL
    exact, found = dense(ids).logits, []
    with pytest.raises(ZeroDivisionError), every_token_sparse(sparse):
        masked = sparse(ids).logits
        with prompt_of(sparse, 32):
            assert_close(sparse(ids).logits, exact, torch.float32)
        thread = threading.Thread(target=torch.inference_mode()(lambda: found.append(sparse(ids).logits)))
        thread.start()
        thread.join()
        assert torch.equal(sparse(ids).logits, masked)
        assert 1 / 0
    assert_close(found[0], exact, torch.float32)
    assert_close(sparse(ids).logits, exact, torch.float32)
    assert (masked - exact).norm() > 0.05 * exact.norm()


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
