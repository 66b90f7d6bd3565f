"""The fused decode step. What it computes on a GPU is checked without one by ops/test_triton_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_close
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.generate import Decoder

SIZES = {"hidden_size": 320, "intermediate_size": 711, "tie_word_embeddings": False}


@torch.inference_mode()
def pair(model, batch=1, length=70, steps=4):
    """Logits of a few steps as transformers runs them, and as the fused step does; and the fused step."""
    ids = torch.randint(4, VOCABULARY, (batch, length + steps))
    found = []
    for mode in (None, "fused"):
        decoder = Decoder(model, length + steps, batch=batch, compile=mode)
        decoder.prefill(ids[:, :length])
        found.append([decoder.step(ids[:, length + i :][:, :1].to(model.device)).clone() for i in range(steps)])
    return *found, decoder.fused


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [(4, 4, 16), (10, 2, 40), (8, 1, 64)], ids=str)
@pytest.mark.parametrize(
    "recipe", [None, "cats", "cats:layers=1:", "teal", "teal:sites=[k,o,up]", "teal:sites=[q,k,v,o,gate] cats"]
)
def test_equals_transformers(device, family, heads, recipe):
    query, groups, size = heads
    options = {"mlp_bias": False} if family == "llama" else {}
    heads = {"num_attention_heads": query, "num_key_value_heads": groups, "head_dim": size}
    model = tiny(family, **SIZES, **options, **heads).to(device)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b.cpu(), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        "int8", "int8 teal", "int8 cats", "int8 teal:sites=[q,k,v,o,gate] cats", "int8:sites=[up,v,head] cats",
        "int8:sites=[k,gate,o] teal:sites=[q,down,head]", "int8 teal:sites=all+head", "teal:sites=all+head",
    ],
)  # fmt: skip
def test_int8_at_some_sites_and_a_head_that_skips(device, tied, recipe):
    model = tiny("llama", mlp_bias=False, **{**SIZES, "tie_word_embeddings": tied}).to(device)
    sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b.cpu(), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["cats", "int8 teal:sites=[q,k,v,o,gate] cats"])
def test_two_runs_give_the_same_bits(monkeypatch, recipe):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = tiny("llama", torch.bfloat16, mlp_bias=False, hidden_size=1024, intermediate_size=4097).cuda()
    sandcat.sparsify(model, None, recipe, calibration=text())
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        first = pair(model, steps=20)[1]
        torch.manual_seed(0)
        assert torch.equal(torch.stack(pair(model, steps=20)[1]), torch.stack(first))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", [None, "teal:sparsity=0.2"])
def test_half_precision(device, dtype, recipe):
    """As near to the float32 model with the same weights as transformers is: it rounds at other places."""
    model = tiny("llama", dtype, mlp_bias=False, **SIZES).to(device)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    torch.manual_seed(1)
    want, found, fused = pair(model)
    assert fused is not None
    torch.manual_seed(1)
    exact = pair(model.float())[0]
    for a, b, c in zip(found, want, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "family, options, batch",
    [("gemma2", {}, 1), ("llama", {"mlp_bias": True}, 1), ("llama", {"mlp_bias": False}, 2)],
)
def test_where_it_does_not_apply(device, family, options, batch):
    if device == "cpu" and options.get("mlp_bias"):
        pytest.skip("on a CPU it does")
    want, found, fused = pair(tiny(family, **options).to(device), batch=batch)
    assert fused is None
    assert torch.equal(torch.stack(found), torch.stack(want))


@pytest.mark.parametrize("recipe", ["coreinfer", "rsparse:alpha=[0.8]"])
def test_not_where_it_lacks_a_module(recipe):
    model = tiny("qwen2", **SIZES)
    sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model)
    assert fused is None
    assert torch.equal(torch.stack(found), torch.stack(want))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("recipe", [None, "cats", "teal", "int8", "int8 teal", "int8 cats", "int8:sites=[q,up,head]"])
def test_threads_and_biases_on_a_cpu(threads, recipe):
    model = tiny("llama", mlp_bias=True, attention_bias=True, **SIZES)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want, found, fused = pair(model, length=300)  # past what attention looks at in one go
    finally:
        torch.set_num_threads(before)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, torch.float32)


@torch.inference_mode()
def test_a_token_outside_the_vocabulary():
    decoder = Decoder(tiny("llama"), 8)
    decoder.prefill(torch.tensor([[5, 6]]))
    with pytest.raises(IndexError, match=f"{VOCABULARY}"):
        decoder.step(torch.tensor([[VOCABULARY]]))


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_rewinds(device):
    model = tiny("llama", mlp_bias=False, **SIZES).to(device)
    ids = torch.randint(4, VOCABULARY, (1, 20)).to(device)
    decoder = Decoder(model, 20)
    decoder.prefill(ids[:, :10])
    want = [decoder.step(ids[:, i : i + 1]).clone() for i in range(10, 20)]
    for start in (10, 15):
        decoder.rewind(start)
        for i in range(start, 20):
            assert_close(decoder.step(ids[:, i : i + 1]), want[i - 10].cpu(), torch.float32)
    decoder.prefill(ids[:, :10])
    assert_close(decoder.step(ids[:, 10:11]), want[0].cpu(), torch.float32)
