"""Models that others have quantised, and our own of int8: what is said of them is what they are, and what works."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import main
from safetensors.torch import load_file, save_file
from tiny import text, tiny, tokenizer
from transformers import AutoModelForCausalLM

import sandcat
from sandcat.errors import CheckpointError, PlanConflict, UnsupportedModel

OTHERS = {
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8 bits": {"load_in_8bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "does not name": {"bits": "many"},
}
"""Of what is not installed here, or not known to transformers, which would only warn and take codes for weights."""
FLOATS = "start from the model that it was made from"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return sandcat.save(tiny("llama"), tokenizer(), tmp_path_factory.mktemp("models") / "dense")


def quantised(dense, folder, config, inside=None):
    """A folder that says that its weights are quantised."""
    folder.mkdir()
    for path in dense.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = json.loads((folder / "config.json").read_text())
    place = data if inside is None else data.setdefault(inside, {})
    place["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("inside", [None, "text_config"])
@pytest.mark.parametrize("what", OTHERS)
def test_quantised_by_others(what, inside, dense, tmp_path, capsys):
    folder = quantised(dense, tmp_path / "in", OTHERS[what], inside)
    if inside is None:
        with pytest.raises(CheckpointError, match=f"{what}.*{FLOATS}"):
            sandcat.load(folder, device="cpu")
    (folder / "model.safetensors").unlink()  # what follows is said before weights are looked for
    assert main("sparsify", folder, "teal", "--dry-run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert what in said and FLOATS in said and "pip install" not in said and "cut off" not in said


def test_a_model_in_memory():
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(PlanConflict, match=f"fp8.*{FLOATS}"):
        sandcat.sparsify(model, None, "cats", calibration=text())


class Codes(torch.Tensor):
    """As torchao puts its weights into plain layers, of which no config tells."""


@pytest.mark.parametrize("change", [lambda w: w.as_subclass(Codes), lambda w: w.to(torch.float8_e4m3fn)])
def test_weights_of_another_kind(change):
    model = tiny("llama")
    up = model.model.layers[1].mlp.up_proj
    weight = change(up.weight.detach())
    del up.weight
    up.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    with pytest.raises(UnsupportedModel, match=rf"layers\.1\.mlp\.up_proj.*{FLOATS}"):
        sandcat.sparsify(model, None, "cats", calibration=text())


def test_what_transformers_turns_into_floats(dense, tmp_path):
    """Weights in fp8, where there is no GPU to run them."""
    config = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head"]}
    folder = quantised(dense, tmp_path / "in", config)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 8) for size in tensors[name].shape])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them as they are")
    model, tok = sandcat.load(folder, device="cpu", to_sparsify=True)
    want = model.model.layers[0].mlp.up_proj.weight.clone()
    for recipe in (None, "cats"):
        if recipe:
            sandcat.sparsify(model, tok, recipe, calibration=text())
        saved = sandcat.save(model, tok, tmp_path / f"{recipe}")
        found = sandcat.load(saved, device="cpu")[0].model.layers[0].mlp.up_proj.weight
        assert found.dtype == torch.float32 and torch.equal(found, want)
        again = AutoModelForCausalLM.from_pretrained(folder)  # not by us
        if recipe:
            sandcat.sparsify(again, tok, recipe, calibration=text())
            again.save_pretrained(tmp_path / "own")
            assert torch.equal(
                load_file(tmp_path / "own" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"], want
            )


def test_saving_what_others_have_quantised(tmp_path):
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(PlanConflict, match="compressed-tensors"):
        sandcat.save(model, tokenizer(), tmp_path / "out")


@pytest.mark.parametrize("recipe, says", [("cats", r"dense=True\)"), ("int8", FLOATS), ("int8 teal", FLOATS)])
def test_our_own(recipe, says, dense, tmp_path, capsys):
    """What is advised works; of int8, dense=True is not advised."""
    model, tok = sandcat.load(dense, device="cpu")
    sandcat.sparsify(model, tok, recipe, calibration=text())
    with pytest.raises(PlanConflict, match=says):
        sandcat.sparsify(model, tok, "teal", calibration=text())
    folder = sandcat.save(model, tok, tmp_path / "out")
    without, _ = sandcat.load(folder, device="cpu", dense=True)
    if recipe == "cats":
        sandcat.sparsify(without, tok, "teal", calibration=text())
    else:
        with pytest.raises(PlanConflict, match="weights are int8, also with dense=True"):
            sandcat.sparsify(without, tok, "teal", calibration=text())
    (folder / "model.safetensors").unlink()
    assert main("sparsify", folder, "teal", "--dry-run") == 2
    assert "start from the model" in " ".join(capsys.readouterr().err.split()).lower()


def test_other_files(tmp_path):
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "q4.gguf"):
        with pytest.raises(CheckpointError, match=r"gguf_file='q4\.gguf'"):
            sandcat.load(name, device="cpu")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        sandcat.load(adapter, device="cpu")
