"""The gate that a step has to pass before it is timed."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.errors import ParityError
from sandcat.layers.op_module import kernel_modules
from sandcat.measuring import edges, step_parity

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RECIPES = [
    None, "int8 teal:sites=all+head", "teal:sites=[q,k,v,o,gate],batch=shared cats:batch=shared",
    "int8 rsparse:alpha=[0.5],sparsity=0.1",
]  # fmt: skip


def sparsified(recipe, dtype, **sizes):
    model = tiny("llama", **sizes)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    return model.to(dtype)


def ids(batch, tokens=24):
    return torch.randint(4, VOCABULARY, (batch, tokens))


class Wrong:
    """A step that runs with one weight smaller than the model's."""

    def __init__(self, step, weight):
        self.step, self.weight = step, weight

    def __getattr__(self, name):
        return getattr(self.step, name)

    def __call__(self, ids_B1):
        before = self.weight.clone()
        self.weight.copy_(before * 0.7)
        logits = self.step(ids_B1).clone()
        self.weight.copy_(before)
        return logits


@pytest.mark.usefixtures("kernels_pay")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_right_step_passes(dtype, recipe, batch):
    model = sparsified(recipe, dtype)
    tokens, before = ids(batch), [m.threshold for m in edges.thresholded(model)]
    step_parity.check_layers("right", model, tokens[:, :-1], tokens[:, -1:])
    assert [m.threshold is old for m, old in zip(edges.thresholded(model), before, strict=True)] == [True] * len(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, found", [
    ("layers.1.mlp.down_proj", "what layer 1 has as added"), ("layers.0.self_attn.k_proj", "what layer 0 has as key"),
    ("lm_head", "what its head gives"),
])  # fmt: skip
def test_a_wrong_step_does_not(monkeypatch, dtype, name, found):
    """Of which the logits alone would not tell: they are as far off where a step only rounds elsewhere."""
    model = sparsified(None, dtype, tie_word_embeddings=False)
    weight, tokens = model.get_submodule(name if "head" in name else f"model.{name}").weight, ids(2)
    fused = step_parity.fused_step
    monkeypatch.setattr(step_parity, "fused_step", lambda model, cache: Wrong(fused(model, cache), weight))
    with pytest.raises(ParityError, match=found):
        step_parity.check_layers("wrong", model, tokens[:, :-1], tokens[:, -1:])


@pytest.mark.usefixtures("kernels_pay")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_the_gate_looks_at_layers(monkeypatch, dtype):
    """It refuses what the logits of the whole step would have let through in bfloat16."""
    model, tokens = sparsified("int8 teal", dtype), ids(3)
    weight = model.model.layers[1].self_attn.o_proj.weight_scale
    logits = []
    for mode in (None, "fused"):
        decoder = Decoder(model, 24, batch=3, compile=mode)
        decoder.prefill(tokens[:, :-1])
        if mode:
            decoder._fuse()
            decoder.forward = Wrong(decoder.fused, weight)
        logits.append(decoder.step(tokens[:, -1:]).clone())
    eager, wrong = logits
    if dtype == torch.bfloat16:
        assert step_parity.error_of(wrong, eager) < step_parity.STEP_TOLERANCE[dtype]
    fused = step_parity.fused_step
    monkeypatch.setattr(step_parity, "fused_step", lambda model, cache: Wrong(fused(model, cache), weight))
    with pytest.raises(ParityError, match="layer 1"):
        step_parity.check_step("wrong", model, tokens[:, :-1], tokens[:, -1:], "fused", wrong, eager)


@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_units_on_the_edge_are_kept(monkeypatch):
    """Of lists that sequences share too, where what is kept on the edge brings others there."""
    model = sparsified("teal:sites=[q],batch=shared", torch.float32)
    module = next(iter(kernel_modules(model).values()))
    x = torch.randn(3, 1, 32)
    before = module.kept(x)
    with edges.thresholds_restored([module]):
        edges.keep_what_is_near(module, x)
        after = module.kept(x)
        for _ in range(20):  # no rounding changes what is kept now
            assert torch.equal(module.kept(x * (1 + 1e-7 * torch.randn_like(x))), after)
    assert torch.equal(module.kept(x), before)


def test_logits_that_are_off_are_looked_at_with_all_units():
    """Where roundings decide, right steps of a deep model differ at will; where nothing is skipped they do not."""
    tokens, logits = ids(1), torch.randn(1, VOCABULARY)
    given = tokens[:, :-1], tokens[:, -1:], "fused", logits, logits + 1
    step_parity.check_step("teal", sparsified("teal", torch.float32), *given)
    with pytest.raises(ParityError, match="its logits"):
        step_parity.check_step("dense", sparsified(None, torch.float32), *given)
