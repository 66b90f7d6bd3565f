"""Token ids that the model has no embedding for: an error that says so, before anything runs."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import VOCABULARY, text, tiny, tokenizer

import sandcat
from sandcat.data import load_text, made
from sandcat.errors import DataError
from sandcat.evaluate import evaluate_text
from sandcat.generate import generate
from sandcat.reports.wanted import Wanted
from sandcat.serving.request_guard import Guard, Limits, Refused

BEYOND = f"token id {VOCABULARY}, and this model's vocabulary ends at {VOCABULARY - 1}"


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def grown():
    """A tokenizer with a token that the model was not resized for."""
    tok = tokenizer()
    tok.add_tokens(["<end>"])
    assert tok("<end>")["input_ids"] == [VOCABULARY]
    return tok


def test_text_from_a_file(model, grown, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 100 + "<end>" + "x" * 100)
    with pytest.raises(DataError, match=BEYOND):
        sandcat.sparsify(model, grown, "cats", calibration=str(path))
    with pytest.raises(DataError, match=BEYOND):
        Wanted(texts=[str(path)], tokens=1000).loaded(model, grown)
    assert load_text(str(path), model, grown, tokens=400).tokens == 256  # what is not read does no harm


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_windows_of_ids(model, wrong):
    ids = text(256).ids_NL.clone()
    ids[2, 7] = wrong
    broken, before = made(ids, "my ids"), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for run in (
        lambda: sandcat.sparsify(model, None, "cats", calibration=broken),
        lambda: evaluate_text(tiny("llama"), [model], broken),
        lambda: Wanted(texts=[broken]).loaded(model, None),
    ):
        with pytest.raises(DataError, match=f"token id {wrong}"):
            run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("end", ["tokenizer", "generation config"])
def test_text_that_the_model_writes(model, grown, end):
    if end == "tokenizer":
        grown.eos_token = "<end>"
    else:
        model.generation_config.eos_token_id = [2, VOCABULARY]
    with pytest.raises(DataError, match=f"eos_token_id.*{BEYOND}"):
        sandcat.sparsify(model, grown, "cats")
    grown.bos_token = "<end>"
    with pytest.raises(DataError, match=f"first token has the {BEYOND}"):
        sandcat.sparsify(model, grown, "cats")


def test_prompts(model, grown):
    with pytest.raises(DataError, match=f"the prompt has the {BEYOND}"):
        next(generate(model, grown, "abc<end>"))
    with pytest.raises(DataError, match=f"the prompt has the {BEYOND}"):
        Wanted(texts=(), prompts=["abc<end>"]).loaded(model, grown)
    model.resize_token_embeddings(VOCABULARY + 1)
    assert next(generate(model, grown, "abc<end>", max_new_tokens=1))


def test_a_request_is_refused():
    """With the reason, whatever it is that the prompt cannot be read for."""

    def count(prompt):
        raise DataError("the prompt has the token id 96")

    guard = Guard(None, name="m", target="m", count=count, limits=Limits(64, 8), key=None)
    with pytest.raises(Refused, match="token id 96") as refused:
        guard.checked(json.dumps({"model": "m", "prompt": "abc"}).encode(), chat=False)
    assert refused.value.status == 400 and refused.value.field == "prompt"
