"""Targets: that they are met, that a search finds what it should, what is saved of them, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, text, tiny, tokenizer

import sandcat
from sandcat.calibration import allocate, spreads
from sandcat.calibration.cost_curves import GRID, Curve, collect
from sandcat.checkpoints.quantizer import plan_of
from sandcat.errors import BadRecipe, BudgetError, PlanConflict
from sandcat.layers.sparse_linear import SparseLinear
from sandcat.layers.sparse_mlp import SparseMLP
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring.bytes_read import bytes_share, read_bytes
from sandcat.measuring.quality import evaluate_text
from sandcat.methods import Cats, Coreinfer, Teal
from sandcat.models.view import ModelView
from sandcat.plans.target import Target

WORDS = text(2048)


def sparse(family="llama", recipe="teal", **options):
    dense = tiny(family)
    model = copy.deepcopy(dense)
    plan = sandcat.sparsify(model, None, recipe, calibration=options.pop("calibration", WORDS), **options)
    return dense, model, plan


def realised(model, words=WORDS):
    """Bytes that a token reads, dense = 1, on the text that the thresholds come from."""
    ((_, dropped),) = evaluate_text(model, [model], words)
    return bytes_share(model, dropped)


@pytest.mark.parametrize("how", ["uniform", "equal-error", "search"])
@pytest.mark.parametrize("recipe", ["cats", "teal:sites=all+head", "cats teal:sites=[q,o,gate,head]"])
def test_targets_are_met(recipe, how):
    for target, bytes in (("bytes=0.8", 0.8), ("sparsity=0.4", None)):
        dense, model, plan = sparse("llama", recipe, target=target, allocate=how)
        if bytes is None:
            modules = sparse_modules(model).values()
            changed = sum(m.weight_bytes() - m.weight_bytes(0) for m in modules)
            thresholds = sum(m.threshold.nbytes for m in modules)  # are read too, and count against what is saved
            bytes = 1 - 0.4 * (changed - thresholds / 0.9) / read_bytes(dense)
        assert abs(plan.budget.bytes - bytes) < (1e-5 if target == "bytes=0.8" else 2e-3)
        assert abs(realised(model) - plan.budget.bytes) < 0.005
        sparsities = {spec["sparsity"] for step in plan.steps for spec in step.sites.values()}
        assert (max(sparsities) - min(sparsities) < 0.01) == (how == "uniform")


@pytest.mark.parametrize("recipe", ["teal", "cats:score=output", "rsparse:sites=[q,o,down]"])
def test_uniform_is_the_method_with_one_sparsity_and_computes_no_more(recipe):
    """What a sparsity costs each site is not measured where only its bytes decide."""

    def made(recipe, **options):
        model, tokens = tiny("llama"), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, out: tokens.append(args[0].shape))
        plan = sandcat.sparsify(model, None, recipe, calibration=WORDS, **options)
        return model, plan, tokens

    model, plan, tokens = made(recipe, target="bytes=0.85", allocate="uniform")
    modules = sparse_modules(model).values()
    saved_by_all = sum(m.size * 4 for m in modules) if "cats" not in recipe else sum(2 * m.size * 4 for m in modules)
    wanted = 0.15 * read_bytes(tiny("llama")) + sum(m.threshold.nbytes for m in modules)
    (method,) = sandcat.plans.recipe.parse_recipe(recipe)
    _, same, few = made(method.at(wanted / saved_by_all))
    assert tokens == few
    assert plan.steps[0].sites.keys() == same.steps[0].sites.keys()
    for name, spec in plan.steps[0].sites.items():
        assert abs(spec["sparsity"] - same.steps[0].sites[name]["sparsity"]) < 1e-4


@pytest.mark.parametrize("target, how", [("bytes=0.8", "uniform"), ("ppl+20%", "uniform"), ("bytes=0.8", "search")])
def test_a_method_that_chooses_in_a_prompt_can_have_a_target(target, how):
    """It is measured on what comes after one, and costs something there."""
    dense, model, plan = sparse("llama", "coreinfer", target=target, allocate=how)
    assert abs(plan.budget.bytes - 0.8) < 1e-5 or target != "bytes=0.8"
    assert sparse_modules(model)
    view, method = ModelView(dense), Coreinfer()
    for curve in collect(view, [(method, site) for site in method.select(view)], WORDS, read_bytes(dense)):
        assert 0 < curve.loss_L[1] < curve.loss_L[-1] and 0 < curve.error_L[1] < curve.error_L[-1] < 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_recipe_on_every_family(family):
    _, model, plan = sparse(family, "sandcat", target="bytes=0.7")
    assert abs(realised(model) - 0.7) < 0.01
    assert plan.steps[0].method == Teal(sites="all+head")
    head = model.get_output_embeddings()
    assert isinstance(head, SparseLinear) == any(name.endswith("lm_head") for name in plan.steps[0].sites)


def test_quality():
    """A stricter target keeps more bytes, and both hold on the text that was kept for measuring."""
    dense, strict, plan = sparse("qwen2", "teal", target="quality=ppl+1%")
    _, loose, other = sparse("qwen2", "teal", target="ppl+20%")
    assert realised(strict) > realised(loose) + 0.02
    _, held = allocate.held_out_of(WORDS)
    for model, found, limit in ((strict, plan, 1.01), (loose, other, 1.2)):
        ((result, _),) = evaluate_text(dense, [model], held)
        assert result.ratio <= limit
        assert abs(result.ratio - found.budget.held_out.perplexity_ratio) < 1e-5
        assert found.calibration.tokens == WORDS.tokens - held.tokens


def test_the_curve_of_a_head_is_its_kl():
    """There the estimate has to be near the divergence itself, which is known."""
    model = tiny("qwen2", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    view = ModelView(model)
    teal = Teal(sites=("head",))
    (curve,) = collect(view, [(teal, site) for site in teal.select(view)], text(4096), read_bytes(model))
    assert curve.site == "lm_head"
    whole, threshold = model.lm_head.weight.nbytes, 4 * model.lm_head.in_features
    assert abs(curve.saved_at(0.5) - (0.5 * whole - threshold) / read_bytes(model)) < 1e-3
    twin = copy.deepcopy(model)
    sandcat.sparsify(twin, None, teal.at(0.3), calibration=text(4096))
    ((result, _),) = evaluate_text(model, [twin], text(4096))
    assert abs(float(curve.loss_at(np.array(0.3))) / result.kl - 1) < 0.15


def curve_of(name, *, cost, saved=0.1, method=None, claims=None):
    return Curve(name, method or Teal(), claims or (name,), saved * GRID, cost * GRID**2, cost * GRID**2)


def test_least_loss_is_the_optimum():
    """For losses c s^2 the optimum is known: s in proportion to bytes over c."""
    costs = [0.01, 0.02, 0.04, 0.08]
    curves = [curve_of(str(cost), cost=cost) for cost in costs]
    found = spreads.least_loss(curves, 0.08)
    want = [0.8 / sum(1 / c for c in costs) / cost for cost in costs]
    assert abs(spreads.saved(curves, found) - 0.08) < 1e-9
    np.testing.assert_allclose(found, want, atol=0.03)

    def loss(sparsities):
        return sum(float(c.loss_at(np.array(s))) for c, s in zip(curves, sparsities, strict=True))

    assert loss(found) < 0.6 * loss(spreads.uniform(curves, 0.08))
    equal = spreads.equal_error(curves, 0.08)
    assert max(c.error_L[-1] for c in curves) > 0
    errors = [float(np.interp(s, GRID, c.error_L)) for s, c in zip(equal, curves, strict=True)]
    np.testing.assert_allclose(errors, errors[0], rtol=1e-6)


@pytest.mark.parametrize("better", ["cats", "teal"])
def test_where_two_methods_want_one_layer_the_search_chooses(better):
    cats, teal = Cats(), Teal()
    cost = {"cats": 0.5, "teal": 0.5} | {better: 0.1}
    curves = [
        curve_of("0.up", cost=cost["teal"] / 2, method=teal),
        curve_of("0.down", cost=cost["teal"] / 2, method=teal),
        curve_of("0.o", cost=0.3, method=teal),
        curve_of("0.mlp", cost=cost["cats"], saved=0.2, method=cats, claims=("0.up", "0.down")),
    ]
    chosen = {curve.site for curve in spreads.choose(curves, 0.1)}
    assert chosen == {"0.o", "0.mlp"} if better == "cats" else {"0.o", "0.up", "0.down"}


def test_no_layer_is_claimed_twice():
    _, model, plan = sparse("llama", "sandcat", target="bytes=0.5")
    for layer in model.model.layers:
        inside = [getattr(layer.mlp, name) for name in ("up_proj", "down_proj")]
        assert not (isinstance(layer.mlp, SparseMLP) and any(isinstance(linear, SparseLinear) for linear in inside))
    names = [name for step in plan.steps for name in step.sites]
    assert len(names) == len(set(names)) == len(sparse_modules(model))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # whose head is tied
def test_saved_and_reloaded(family, tmp_path):
    _, model, plan = sparse(family, "sandcat", target="bytes=0.7", allocate="search")
    again, _ = sandcat.load(sandcat.save(model, tokenizer(), tmp_path / "out"), device="cpu")
    assert plan_of(again) == plan
    assert plan.budget == replace(plan.budget, target="bytes=0.7", allocate="search")
    assert plan.recipe.endswith("--bytes 0.7 --allocate search")
    ids = torch.randint(4, 96, (2, 9))
    for shape in (ids, ids[:1, :1]):
        with torch.inference_mode():
            assert torch.equal(again(shape).logits, model(shape).logits)


@torch.inference_mode()
def test_a_sparse_head_computes_what_it_should():
    """Tied to the embedding table or not, for prompts and single tokens; and generation goes on working."""
    for tied in (True, False):
        dense = tiny("llama", tie_word_embeddings=tied)
        model = copy.deepcopy(dense)
        sandcat.sparsify(model, None, Teal(sparsity=0.4, sites=("head",)), calibration=WORDS)
        threshold = model.lm_head.threshold
        states = []
        dense.lm_head.register_forward_pre_hook(lambda m, args, states=states: states.append(args[0]))
        for ids in (torch.randint(4, 96, (1, 1)), torch.randint(4, 96, (3, 20))):
            dense(ids)
            want = F.linear(torch.where(states[-1].abs() > threshold, states[-1], 0), dense.lm_head.weight)
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert len(model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)[0]) > 2


def test_the_model_is_left_alone():
    model = tiny("llama")
    modules, config = dict(model.named_modules()), model.config.to_dict()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plan = sandcat.sparsify(model, None, target="bytes=0.8", calibration=WORDS, dry_run=True)
    assert plan.budget.target == "bytes=0.8"
    assert dict(model.named_modules()) == modules and model.config.to_dict() == config
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "error, said, recipe, options",
    [
        (BudgetError, r"bytes=0.2 cannot be met: .* comes to bytes=0\.\d+", "cats", {"target": "bytes=0.2"}),
        (BudgetError, "comes to sparsity=0.900", "teal", {"target": "sparsity=0.95", "allocate": "uniform"}),
        (BudgetError, "one window of text", "teal", {"target": "ppl+1%", "calibration": text(256, window=256)}),
        (BadRecipe, "relufy has none", "relufy", {"target": "bytes=0.9"}),
        (BadRecipe, "leave out one of the two", "cats:sparsity=0.3", {"target": "bytes=0.9"}),
        (BadRecipe, "did you mean 'uniform'", "cats", {"target": "bytes=0.9", "allocate": "unifrom"}),
        (BadRecipe, "spreads a target: give one", "cats", {"allocate": "search"}),
        (BadRecipe, "between 0 and 1", "cats", {"target": "bytes=1.5"}),
        (BadRecipe, "between 0 and 1", "cats", {"target": "bytes=nan"}),
        (BadRecipe, "a loss above 0 %", "cats", {"target": "ppl+-1%"}),
        (BadRecipe, "is unknown. Give sparsity=", "cats", {"target": "speed=2"}),
        (BadRecipe, "is not understood", "cats", {"target": "bytes=half"}),
        (BadRecipe, "is not understood", "cats", {"target": "quality=0.01"}),
        (PlanConflict, "allocate=search chooses", "sandcat", {"target": "bytes=0.8", "allocate": "uniform"}),
    ],
)
def test_mistakes(error, said, recipe, options):
    model = tiny("llama")
    before = dict(model.named_modules())
    with pytest.raises(error, match=said):
        sandcat.sparsify(model, None, recipe, **{"calibration": WORDS, **options})
    assert dict(model.named_modules()) == before


def test_targets_print_as_they_are_read():
    for word in ("bytes=0.72", "sparsity=0.5", "quality=ppl+1%", "quality=ppl+0.5%"):
        assert str(Target.parse(word)) == word
