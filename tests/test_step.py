"""The fused decode step. What it computes is checked without a GPU by ops/test_triton_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.generate import Decoder
from sandcat.step import fused_step

SIZES = {"hidden_size": 320, "intermediate_size": 711, "tie_word_embeddings": False}


def test_not_on_a_cpu():
    decoder = Decoder(tiny("llama"), 8)
    with torch.inference_mode():
        decoder.prefill(torch.randint(4, VOCABULARY, (1, 4)))
        assert fused_step(decoder.model, decoder.cache) is None
        decoder.step(torch.tensor([[5]]))


@torch.inference_mode()
def pair(model, batch=1, length=70, steps=4):
    """Logits of a few steps as transformers runs them, and as the fused step does; and the fused step."""
    ids = torch.randint(4, VOCABULARY, (batch, length + steps))
    found = []
    for mode in (None, "fused"):
        decoder = Decoder(model, length + steps, batch=batch, compile=mode)
        decoder.prefill(ids[:, :length])
        found.append([decoder.step(ids[:, length + i :][:, :1].cuda()).clone() for i in range(steps)])
    return *found, decoder.fused


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [(4, 4, 16), (10, 2, 40), (8, 1, 64)], ids=str)
@pytest.mark.parametrize(
    "recipe", [None, "cats", "cats:layers=1:", "teal", "teal:sites=[k,o,up]", "teal:sites=[q,k,v,o,gate] cats"]
)
def test_equals_transformers(family, heads, recipe):
    query, groups, size = heads
    options = {"mlp_bias": False} if family == "llama" else {}
    heads = {"num_attention_heads": query, "num_key_value_heads": groups, "head_dim": size}
    model = tiny(family, **SIZES, **options, **heads).cuda()
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b.cpu(), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", [None, "teal:sparsity=0.2"])
def test_half_precision(dtype, recipe):
    """As near to the float32 model with the same weights as transformers is: it rounds at other places."""
    model = tiny("llama", dtype, mlp_bias=False, **SIZES).cuda()
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    torch.manual_seed(1)
    want, found, fused = pair(model)
    assert fused is not None
    torch.manual_seed(1)
    exact = pair(model.float())[0]
    for a, b, c in zip(found, want, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "family, options, batch",
    [("gemma2", {}, 1), ("llama", {"mlp_bias": True}, 1), ("llama", {"mlp_bias": False}, 2)],
)
def test_where_it_does_not_apply(family, options, batch):
    want, found, fused = pair(tiny(family, **options).cuda(), batch=batch)
    assert fused is None
    assert torch.equal(torch.stack(found), torch.stack(want))


@pytest.mark.gpu
@torch.inference_mode()
def test_rewinds():
    model = tiny("llama", mlp_bias=False, **SIZES).cuda()
    ids = torch.randint(4, VOCABULARY, (1, 20)).cuda()
    decoder = Decoder(model, 20)
    decoder.prefill(ids[:, :10])
    want = [decoder.step(ids[:, i : i + 1]).clone() for i in range(10, 20)]
    for start in (10, 15):
        decoder.rewind(start)
        for i in range(start, 20):
            assert_close(decoder.step(ids[:, i : i + 1]), want[i - 10].cpu(), torch.float32)
    decoder.prefill(ids[:, :10])
    assert_close(decoder.step(ids[:, 10:11]), want[0].cpu(), torch.float32)
