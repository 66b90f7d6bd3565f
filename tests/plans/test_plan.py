"""Recipes and plans: words to methods and back, and what is refused."""

from __future__ import annotations

import pytest
from tiny import text, tiny

import sandcat
from sandcat.errors import BadRecipe, NothingMatched, PlanConflict, PlanError, UnsupportedModel
from sandcat.methods import METHODS, Cats, Relufy
from sandcat.plans.plan import FORMAT_VERSION, Plan
from sandcat.plans.recipe import parse, parse_recipe


def test_words():
    assert parse("cats") == Cats()
    assert parse("cats:sparsity=0.3,score=output,dense_prompt=yes") == Cats(
        sparsity=0.3, score="output", dense_prompt=True
    )
    assert parse("cats:layers=[0,2,-1],sparsity=.4") == Cats(layers=(0, 2, -1), sparsity=0.4)
    assert parse("relufy:layers=2:") == Relufy(layers="2:")
    assert parse_recipe("cats:layers=0:1 relufy:layers=1:") == [Cats(layers="0:1"), Relufy(layers="1:")]


@pytest.mark.parametrize("method", [Cats(), Cats(sparsity=0.25, score="output", layers=(1, 3)), Relufy(layers="::2")])
def test_a_method_prints_as_its_word(method):
    assert parse(str(method)) == method
    assert type(method).from_options(method.options()) == method


@pytest.mark.parametrize(
    "word, said",
    [
        ("cat:sparsity=0.5", "did you mean 'cats'"),
        ("cats:sparsty=0.5", "did you mean 'sparsity'"),
        ("cats:sparsity=1", "outside [0, 1)"),
        ("cats:sparsity=-0.1", "outside [0, 1)"),
        ("cats:sparsity=nan", "outside [0, 1)"),
        ("cats:sparsity=half", "is not a float"),
        ("cats:score=outputs", "did you mean 'output'"),
        ("cats:dense_prompt=perhaps", "is not a bool"),
        ("cats:layers=some", "slice such as"),
        ("cats:layers=[a]", "is not a str | list"),
        ("cats:sparsity", "not option=value"),
        ("", "empty"),
    ],
)
def test_bad_words(word, said):
    with pytest.raises(BadRecipe) as error:
        parse_recipe(word)
    assert said in str(error.value)


def test_every_option_is_documented():
    for method in METHODS:
        assert method.__module__ == f"sandcat.methods.{method.name}"
        for option in method.describe():
            assert option["help"] and option["type"]


def test_one_slot_twice():
    model = tiny("llama")
    before = dict(model.named_modules())
    with pytest.raises(PlanConflict, match=r"cats and relufy both want the input of model\.layers\.0\.mlp"):
        sandcat.sparsify(model, None, "cats relufy", calibration=text())
    sandcat.sparsify(model, None, "cats:layers=0:1 relufy:layers=1:", calibration=text())
    with pytest.raises(PlanConflict, match="already has a plan"):
        sandcat.sparsify(model, None, "cats", calibration=text())
    assert before["model.layers.0.mlp"] is not model.model.layers[0].mlp


@pytest.mark.parametrize("layers", ["2:", "[5]", "[-3]"])
def test_no_such_layer(layers):
    with pytest.raises(NothingMatched, match="has layers 0 to 1"):
        sandcat.sparsify(tiny("llama"), None, f"cats:layers={layers}", calibration=text())


def test_unsupported_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    with pytest.raises(UnsupportedModel, match=r"'gpt2' is not supported.*add the row 'gpt2'"):
        sandcat.sparsify(model, None, "cats", calibration=text())


def test_unknown_activation():
    with pytest.raises(UnsupportedModel, match="activation 'tanh'"):
        sandcat.sparsify(tiny("llama", hidden_act="tanh"), None, "cats", calibration=text())


def test_dry_run_and_errors_leave_the_model_alone():
    model = tiny("qwen2")
    modules, config = dict(model.named_modules()), model.config.to_dict()
    plan = sandcat.sparsify(model, None, "cats", calibration=text(), dry_run=True)
    assert len(plan.steps[0].sites) == 2
    model.model.layers[1].mlp.up_proj.weight.data[:] = float("inf")
    model.model.layers[1].mlp.gate_proj.weight.data[:] = float("inf")
    with pytest.raises(sandcat.SandcatError, match="infinities"):
        sandcat.sparsify(model, None, "cats", calibration=text())
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_json_round_trip():
    model = tiny("llama")
    plan = sandcat.sparsify(model, None, [Cats(sparsity=0.3, layers=(0,)), Relufy(layers="1:")], calibration=text())
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.recipe == "cats:layers=[0],sparsity=0.3 relufy:layers=1:"


def test_plans_that_cannot_be_read():
    good = sandcat.sparsify(tiny("llama"), None, "cats", calibration=text(), dry_run=True).to_json()
    with pytest.raises(PlanError, match=r"format version 99.*Upgrade"):
        Plan.from_json({**good, "format_version": 99})
    with pytest.raises(PlanError, match="without a format_version"):
        Plan.from_json({"quant_method": "sandcat"})
    with pytest.raises(PlanError, match="no method 'dogs'"):
        Plan.from_json({**good, "methods": [{"name": "dogs", "options": {}, "sites": {}}]})
    assert good["format_version"] == FORMAT_VERSION
