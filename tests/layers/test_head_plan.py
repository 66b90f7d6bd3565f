"""Heads that keep a window each: what they see is the same on every path, and what they do not keep takes no pages."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICES, assert_close
from tiny import VOCABULARY, tiny
from transformers import AttentionInterface, AttentionMaskInterface

import sandcat
from sandcat.decoding import step
from sandcat.decoding.decoder import Decoder
from sandcat.errors import UnsupportedModel
from sandcat.layers.head_plan import HeadPlan
from sandcat.method import Method
from sandcat.plans import recipe
from sandcat.support.options import option

WINDOW = 5


@dataclass(frozen=True, kw_only=True)
class EverySecond(Method):
    """Every second head keeps a window."""

    name = "everysecond"
    slot = "cache"

    window: int = option(WINDOW, "tokens that such a head keeps")

    needs = frozenset()

    def kinds(self, view):
        return ("cache",)

    def decide(self, site, seen):
        heads = site.module.config.num_key_value_heads
        return {"windows": [0 if head % 2 else self.window for head in range(heads)]}, {}

    def build(self, site, spec):
        return HeadPlan(spec["windows"])


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(recipe, "METHODS", (*recipe.METHODS, EverySecond))


def made(family="llama", device="cpu", **sizes):
    """A model with such heads, and one of its weights whose attention is written out, head by head, for whole texts."""
    dense = tiny(family, num_key_value_heads=4, **sizes).to(device)
    planned = copy.deepcopy(dense)
    sandcat.sparsify(planned, None, [EverySecond()])

    def attention(module, q, k, v, mask, scaling, softcap=None, **_):
        local = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        at = torch.arange(q.shape[2], device=q.device)
        out = torch.empty_like(q)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            window = min(2**20 if group % 2 else WINDOW, local or 2**20)
            seen = (at[:, None] >= at) & (at[:, None] - at < window)
            score = q[:, head] @ k[:, group].transpose(1, 2) * scaling
            score = softcap * (score / softcap).tanh() if softcap else score
            out[:, head] = score.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, group]
        return out.transpose(1, 2), None

    AttentionInterface.register("written_out", attention)
    AttentionMaskInterface.register("written_out", AttentionMaskInterface()["sdpa"])
    dense.set_attn_implementation("written_out")
    return planned, dense


def texts(batch, length):
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_steps_see_what_a_whole_text_sees(monkeypatch, family, batch, device):
    """Eager and fused, past the window and over pages, and after going back."""
    monkeypatch.setattr(step, "PAGE", 4)
    window = {"sliding_window": 9} if family == "mistral" else {}
    planned, dense = made(family, device, **window)
    ids = texts(batch, 30).to(device)
    for compile in (None, "fused"):
        decoder = Decoder(planned, 30, batch=batch, compile=compile)
        assert_close(decoder.prefill(ids[:, :12]), dense(ids[:, :12]).logits[:, -1], torch.float32)
        want = dense(ids).logits
        for i in range(12, 30):
            assert_close(decoder.step(ids[:, i : i + 1]), want[:, i], torch.float32)
        assert (decoder.fused is not None) == (compile == "fused" and family in ("llama", "mistral"))
        decoder.rewind(26)
        for i in range(26, 30):
            assert_close(decoder.step(ids[:, i : i + 1]), want[:, i], torch.float32)


@pytest.mark.parametrize("compile", [None, "fused"])
@torch.inference_mode()
def test_lengths_that_differ(monkeypatch, compile):
    monkeypatch.setattr(step, "PAGE", 4)
    planned, dense = made()
    ids, pads = texts(3, 26), (0, 11, 4)
    decoder = Decoder(planned, 26, batch=3, compile=compile)
    decoder.prefill(ids[:, :14], torch.arange(14) >= torch.tensor(pads)[:, None])
    for i in range(14, 26):
        found = decoder.step(ids[:, i : i + 1])
        for b, pad in enumerate(pads):
            assert_close(found[b], dense(ids[b : b + 1, pad : i + 1]).logits[0, -1], torch.float32)


GENERATING = [{}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}, {"use_cache": False}]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", GENERATING, ids=str)
@torch.inference_mode()
def test_generate(options, implementation):
    planned, dense = made()
    planned.set_attn_implementation(implementation)
    ids = texts(2, 11)
    out = planned.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True, eos_token_id=None, disable_compile=True, **options,
    )  # fmt: skip
    want = dense(out.sequences[:, :-1]).logits[:, 10:]
    assert_close(torch.stack(out.logits, 1), want, torch.float32)


@torch.inference_mode()
def test_a_window_takes_as_many_pages_as_it_needs(monkeypatch):
    monkeypatch.setattr(step, "PAGE", 4)
    planned, _ = made()
    decoder = Decoder(planned, 64)
    decoder.prefill(texts(1, 40))
    cache = decoder.cache
    assert len(cache.pool.keys) == 2 * (2 * 16 + 2 * 3)  # layers, heads that keep all, heads that keep five
    assert cache.bytes_read() == 2 * (2 * 40 + 2 * WINDOW) * 2 * 8 * 4
    decoder.step(texts(1, 1))
    assert decoder.fused is not None


def test_other_masks_are_refused():
    planned, _ = made()
    planned.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModel, match="'sdpa' or 'eager'"):
        planned(texts(1, 6))
    planned.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedModel, match="continuous batching"):
        planned(texts(1, 6), cache=object())
