"""What is no model of a known family, or has no language model's head: refused before anything is read or changed."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import main
from tiny import text, tiny, tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import sandcat
from sandcat.checkpoints import load as loading
from sandcat.errors import UnsupportedModel
from sandcat.models.families import check_config

EXPERTS = "mixture of experts"
OTHER_HEADS = [
    AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering,
]  # fmt: skip


@pytest.mark.parametrize(
    "config, says",
    [
        ({"model_type": "gpt2"}, "add the row 'gpt2'"),
        ({"model_type": "unheard_of"}, "add the row 'unheard_of'"),
        ({"model_type": "unheard_of", "text_config": {"n_routed_experts": 8}}, EXPERTS),
        ({"model_type": "qwen3_moe"}, EXPERTS),  # saved without the number, which is then the default
        ({"model_type": "hunyuan_v1_moe", "num_experts": 64}, EXPERTS),
        ({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}, EXPERTS),
        ({"model_type": "t5"}, "encoder"),
        ({"model_type": "llama", "hidden_act": "xielu"}, "activation 'xielu' is not known"),
        ({"model_type": "gemma3", "text_config": {"hidden_activation": "xielu"}}, "activation 'xielu'"),
        ({}, "model_type None"),
    ],
    ids=str,
)
def test_a_config_says_enough(config, says):
    with pytest.raises(UnsupportedModel, match=says) as refused:
        check_config(config)
    assert (EXPERTS in str(refused.value)) == (says == EXPERTS)
    assert EXPERTS not in says or "add the row" not in str(refused.value)


def test_no_weights_are_fetched(tmp_path, monkeypatch, capsys):
    """Neither of a folder, whose weights are not even there, nor from the hub, whose weights would take long."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert main("sparsify", tmp_path, "cats", "--dry-run") == 2
    assert EXPERTS in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(loading, "fetch_texts", lambda name: tmp_path)
    monkeypatch.setattr(loading, "fetch", lambda name: pytest.fail("fetched"))
    assert main("sparsify", "some/model", "cats", "--dry-run") == 2
    assert EXPERTS in " ".join(capsys.readouterr().err.split())
    assert main("sweep", "some/model", "-o", tmp_path / "sweep", "--bytes", "0.8") == 2
    assert EXPERTS in " ".join(capsys.readouterr().err.split())


def test_other_models_still_run(tmp_path, monkeypatch):
    """Dense, as `sandcat generate` takes them: of any family."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    monkeypatch.setattr(loading, "fetch_texts", lambda name: tmp_path)
    fetched = []
    monkeypatch.setattr(loading, "fetch", lambda name: fetched.append(name) or tmp_path)
    with pytest.raises(sandcat.SandcatError, match=r"no model\.safetensors"):
        sandcat.load("some/model", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny("llama")
    sandcat.sparsify(model, None, "cats", calibration=text(256))
    return sandcat.save(model, tokenizer(), tmp_path_factory.mktemp("sparse") / "llama")


@pytest.mark.parametrize("kind", OTHER_HEADS, ids=lambda kind: kind.__name__)
def test_other_heads(kind, folder, tmp_path):
    with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM"):
        kind.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = kind.from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM"):
        sandcat.sparsify(model, tokenizer(), "cats", calibration=text(256))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sandcat.load(folder, dense=True, device="cpu")[0].save_pretrained(tmp_path)  # as the message has it
    if kind is AutoModelForQuestionAnswering:  # which takes no weights of a language model
        return
    found = dict(kind.from_pretrained(tmp_path).named_parameters())
    name = next(name for name in found if name.endswith("layers.0.mlp.up_proj.weight"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(found[name], dense.model.layers[0].mlp.up_proj.weight)
