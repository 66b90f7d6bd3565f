"""Loading in another dtype than the saved one, and what cannot be loaded says what it is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, text, tiny, tokenizer

import sandcat
from sandcat.checkpoints.load import verify
from sandcat.errors import ParityError, PlanError
from sandcat.layers.fingerprint import agrees, magnitude
from sandcat.quantile import LARGEST

IDS = torch.randint(4, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def near_dead(tmp_path_factory):
    """A folder in which neuron 5 of the first layer adds next to nothing, and neuron 6 nothing."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5] *= 1e-6
        model.model.layers[0].mlp.down_proj.weight[:, 6] = 0
    sandcat.sparsify(model, None, "cats:score=output", calibration=text())
    assert model.model.layers[0].mlp.threshold[5:7].tolist() == [LARGEST, LARGEST]
    return sandcat.save(model, tokenizer(), tmp_path_factory.mktemp("models") / "near-dead")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@torch.inference_mode()
def test_thresholds_of_neurons_that_add_nothing(dtype, near_dead, tmp_path):
    """In every dtype they are dropped, and the model is saved and loaded again."""
    model, tok = sandcat.load(near_dead, device="cpu", dtype=dtype)
    mlp = model.model.layers[0].mlp
    assert mlp.threshold.isfinite().all()
    assert not mlp.kept(torch.randn(1, 8, 32).to(model.dtype))[..., 5:7].any()
    again, _ = sandcat.load(sandcat.save(model, tok, tmp_path / "out"), device="cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_folder_with_larger_thresholds(near_dead, tmp_path):
    """As older versions saved them: what float16 cannot hold is infinite there, and not missing."""
    model, tok = sandcat.load(near_dead, device="cpu")
    folder = sandcat.save(model, tok, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    threshold = tensors["model.layers.0.mlp.threshold"]
    threshold[5], threshold[6] = 3e5, torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    spec = config["quantization_config"]["methods"][0]["sites"]["model.layers.0.mlp"]
    spec["fingerprint"]["threshold"] = magnitude(threshold)
    (folder / "config.json").write_text(json.dumps(config))
    for dtype in ("float32", "bfloat16", "float16"):
        found = sandcat.load(folder, device="cpu", dtype=dtype)[0].model.layers[0].mlp
        assert not found.kept(torch.randn(1, 8, 32).to(found.threshold.dtype))[..., 5:7].any()
    sandcat.save(sandcat.load(folder, device="cpu")[0].half(), tok, tmp_path / "half")  # converted in memory
    threshold[:] = 7
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for dtype in ("float32", "float16"):
        with pytest.raises(PlanError, match="threshold"):
            sandcat.load(folder, device="cpu", dtype=dtype)


def test_fingerprints_in_narrower_dtypes():
    wide = torch.tensor([1.0, 2.0, 1e5, torch.inf])
    assert all(agrees(wide.to(dtype), magnitude(wide)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not agrees(torch.tensor([1.0, 2.0, 3e4]), magnitude(torch.tensor([1.0, 2.0, 3.0])))
    assert not agrees(torch.tensor([1e6, 1e6, torch.inf]), magnitude(wide))  # more than there was


def test_verify_a_model_that_overflows(tmp_path):
    """What is NaN before and after is the same; what is NaN in one alone is not."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    folder = sandcat.save(model, tokenizer(), tmp_path / "out")
    verify(model, folder)
    with torch.no_grad():
        model.model.norm.weight[0] = 1
    with pytest.raises(ParityError):
        verify(model, folder)
