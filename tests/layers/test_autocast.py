"""torch.autocast, of lm-eval's mixed precision and of the Trainer's: every method works in it, and keeps its dtypes."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from tiny import text, tiny, tokenizer

import sandcat
from sandcat.generate import generate
from sandcat.layers.op_module import kernel_modules
from sandcat.methods import METHODS
from sandcat.plans.recipe import parse_recipe

RECIPES = [
    "cats", "cats:batch=shared", "relufy", "teal:sparsity=0.4,sites=all+head", "rsparse:sparsity=0.4,alpha=[0.7]",
    "coreinfer", "int8", "int8 teal:sparsity=0.4", "int8 cats", "fp8",
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16]


def test_every_method_is_here():
    assert {type(method) for recipe in RECIPES for method in parse_recipe(recipe)} == set(METHODS)


def sparsified(recipe: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = tiny(family, dtype)
    sandcat.sparsify(model, None, recipe, calibration=text(256))
    return model


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_decodes_and_trains(recipe, family):
    """Weights in each dtype under autocast to each; transformers' loop, alone and in a batch, and a training step."""
    for weights in (torch.float32, torch.bfloat16):
        model = sparsified(recipe, family, weights)
        ids = torch.randint(4, 96, (2, 7))
        for dtype in DTYPES:
            with torch.autocast("cpu", dtype=dtype):
                for part in (ids[:1], ids):
                    model.generate(part, attention_mask=torch.ones_like(part), max_new_tokens=3, do_sample=False)
                out = model(ids, labels=ids)
                assert out.logits.dtype == dtype and out.logits.isfinite().all()
            out.loss.backward()


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "coreinfer"])
@torch.inference_mode()
def test_a_module_gives_what_it_gives_without(recipe):
    """The same units in a decode step, whose kernel runs in the dtype of the weights; outputs in autocast's, as those
    of a dense layer. coreinfer's modules run in a whole model only."""
    for weights in (torch.float32, torch.bfloat16):
        for name, module in kernel_modules(sparsified(recipe, dtype=weights)).items():
            inputs = getattr(module, "in_features", 32)
            for dtype in DTYPES:
                x = torch.randn(1, 5, inputs, dtype=dtype)
                with torch.autocast("cpu", dtype=dtype):
                    step, prompt = module(x[:, :1]), module(x)
                assert step.dtype == prompt.dtype == dtype, name
                assert torch.equal(step, module(x[:, :1].to(weights)).to(dtype)), name
                if hasattr(module, "threshold"):  # else a gate of 16 bits drops others
                    module.threshold.fill_(-1)
                    with torch.autocast("cpu", dtype=dtype):
                        prompt = module(x)
                assert_close(prompt, module(x.to(weights)), torch.bfloat16)


@pytest.mark.parametrize("recipe", [None, "teal:sparsity=0.4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_our_loop_writes_the_same_text(recipe, family):
    """Its cache and its fused step have one dtype, the model's."""
    model = tiny(family)
    if recipe is not None:
        sandcat.sparsify(model, None, recipe, calibration=text(256))
    want = "".join(generate(model, tokenizer(), "abc", max_new_tokens=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "".join(generate(model, tokenizer(), "abc", max_new_tokens=8)) == want
