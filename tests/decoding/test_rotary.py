"""Rotary embeddings whose factors change with the length: what is written is what transformers writes."""

from __future__ import annotations

import pytest
import torch
from tiny import text, tiny, tokenizer

import sandcat
from sandcat.data import load_text
from sandcat.decoding.decoder import Decoder
from sandcat.errors import UnsupportedModel
from sandcat.evaluate import evaluate_text
from sandcat.generate import generate
from sandcat.measuring.speed import benchmark
from sandcat.models.rotary import context, steady_length
from sandcat.ops import kernel_name

EDGE = 24
"""Tokens past which the factors are others."""
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4, "factor": 8.0,
    "original_max_position_embeddings": EDGE,
}  # fmt: skip
GROWING = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
KINDS = {
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": EDGE}),
    "llama longrope": ("llama", {"rope_parameters": LONG}),
    "llama dynamic": ("llama", {"rope_parameters": GROWING, "max_position_embeddings": EDGE}),
    "gemma3 dynamic": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": GROWING, "sliding_attention": PLAIN},
            "layer_types": ["full_attention", "sliding_attention"],
            "max_position_embeddings": EDGE,
        },
    ),
}


def made(kind: str, recipe: str | None = None) -> torch.nn.Module:
    family, changes = KINDS[kind]
    model = tiny(family, **changes)
    model.generation_config.eos_token_id = None
    if recipe is not None:
        sandcat.sparsify(model, None, recipe, calibration=text(512, window=16))
    return model


@pytest.mark.parametrize("recipe", [None, "teal:sparsity=0.4", "coreinfer", "cats:dense_prompt=true"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_transformers_writes(kind, recipe):
    """From before the edge across it, at it, and from past it; one after the other, of the same model."""
    model, tok = made(kind, recipe), tokenizer()
    tok.eos_token = None
    for prompt in ("Once upon a time there was a cat", "Once upon a time", "Once upon a time there w"):
        ids = tok(prompt, return_tensors="pt")["input_ids"]
        other = made(kind, recipe)  # held while it generates
        want = other.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert "".join(generate(model, tok, prompt, max_new_tokens=24)) == tok.decode(want, skip_special_tokens=True)


FIXED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": EDGE, "attention_factor": 1.3},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": EDGE,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FIXED)
def test_fused_steps_turn_by_any_factors_that_stay(kind):
    model, tok = tiny("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **FIXED[kind]}), tokenizer()
    model.generation_config.eos_token_id = tok.eos_token = None
    ids = tok("Once upon a time", return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "".join(generate(model, tok, "Once upon a time", max_new_tokens=24)) == tok.decode(
        want, skip_special_tokens=True
    )
    decoder = Decoder(model, 20)
    decoder.prefill(ids)
    decoder.step(ids[:, :1])
    assert decoder.fused is not None or kernel_name("sparse_mlp", "cpu") != "numba"


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_steps_of_a_batch_after_rewinding(kind):
    """A step gives the same again, on whichever side of the edge the decoder was since."""
    decoder = Decoder(made(kind), 40, batch=2)
    ids = torch.randint(4, 96, (2, 40))
    decoder.prefill(ids[:, :20])
    want = [decoder.step(ids[:, i : i + 1]).clone() for i in range(20, 40)]
    for start in (30, 22, EDGE, 20):
        decoder.rewind(start)
        found = [decoder.step(ids[:, i : i + 1]).clone() for i in range(start, 40)]
        torch.testing.assert_close(torch.stack(found), torch.stack(want[start - 20 :]), rtol=1e-4, atol=1e-4)


def test_a_step_that_is_another_with_each_token_is_not_compiled():
    """And a benchmark, which would compile one, times the others."""
    with pytest.raises(UnsupportedModel, match="dynamic"):
        Decoder(made("llama dynamic"), 40, compile="default")
    result = benchmark(made("llama dynamic"), made("llama dynamic", "teal"), text(64).ids_NL[:1, :40], steps=4, runs=1)
    assert set(result.variants) == {"dense eager", "sparse eager"}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_where_a_whole_window_is_still_what_decoding_gives(kind, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 60)
    for source in (str(path), "self"):
        assert load_text(source, made(kind), tokenizer(), tokens=300).ids_NL.shape[1] == EDGE


def test_lengths():
    assert context(tiny("llama").config) == 256 and steady_length(tiny("llama").config) is None
    for kind, holds in {"phi3 longrope": 256, "llama dynamic": 3 * EDGE, "gemma3 dynamic": 3 * EDGE}.items():
        assert context(made(kind).config) == holds and steady_length(made(kind).config) == EDGE


@pytest.mark.parametrize("kind", ["llama dynamic", "gemma3 dynamic"])
def test_what_was_read_before_changes_nothing(kind):
    """A longer text leaves its factors behind; windows as long as the edge, where transformers does not look."""
    words, dense = text(480, window=EDGE), made(kind)
    fresh = made(kind)
    plan = sandcat.sparsify(fresh, None, "teal", calibration=words)
    want = evaluate_text(dense, [fresh], words)
    used = made(kind)
    for model in (dense, used):
        model(torch.randint(4, 96, (1, 60)))
    assert sandcat.sparsify(used, None, "teal", calibration=words).to_json() == plan.to_json()
    used(torch.randint(4, 96, (1, 60)))
    assert evaluate_text(dense, [used], words) == want
