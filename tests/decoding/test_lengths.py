"""Sequences of different lengths in one batch, padded on the left: each is as alone. The same on a GPU without one:
ops/interpret_step.py."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_close, relative_error
from tiny import VOCABULARY, text, tiny

import sandcat
from sandcat.decoding import step
from sandcat.decoding.decoder import Decoder
from sandcat.errors import DataError
from sandcat.measuring import step_parity

LENGTHS = [3, 17, 40]
STEPS = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prompts(lengths=LENGTHS, steps=STEPS):
    """Random ids [B, T + steps] with noise where there is padding, and the mask [B, T]."""
    T = max(lengths)
    return torch.randint(0, VOCABULARY, (len(lengths), T + steps)), torch.arange(T) >= T - torch.tensor(lengths)[
        :, None
    ]


@torch.inference_mode()
def written(model, ids, mask, mode="fused", decoder=None):
    """Logits [B, steps, vocabulary] of the tokens after the prompts, and the decoder."""
    T, device = mask.shape[1], model.device
    decoder = decoder or Decoder(model, ids.shape[1], batch=len(ids), compile=mode)
    decoder.prefill(ids[:, :T].to(device), mask)
    found = [decoder.step(ids[:, i : i + 1].to(device)).clone().cpu() for i in range(T, ids.shape[1])]
    return torch.stack(found, 1), decoder


def alone(model, ids, mask, mode=None):
    """The same of each sequence by itself."""
    pads = (~mask).sum(1).tolist()
    return torch.cat([
        written(model, ids[b : b + 1, pad:], mask[b : b + 1, pad:], mode)[0] for b, pad in enumerate(pads)
    ])  # fmt: skip


@pytest.mark.usefixtures("kernels_pay")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [4, 256])
@pytest.mark.parametrize("family, recipe", [
    ("llama", None), ("mistral", None), ("qwen3", "int8"), ("llama", "teal"), ("qwen2", "int8 cats"),
])  # fmt: skip
def test_each_is_as_alone(monkeypatch, device, page, family, recipe):
    """Over steps of the model too, where the fused one does not apply; and over pages that a window frees."""
    monkeypatch.setattr(step, "PAGE", page)
    options = {"mlp_bias": False} if family == "llama" else {"sliding_window": 9} if family == "mistral" else {}
    model = tiny(family, **options).to(device)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    ids, mask = prompts()
    want = alone(model, ids, mask)
    for mode in ("fused", None):
        found, decoder = written(model, ids, mask, mode)
        assert (decoder.fused is not None) == (mode is not None)
        assert_close(found, want, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_each_layer_is_the_models(device, dtype):
    model = tiny("llama", dtype, mlp_bias=False).to(device)
    ids, mask = prompts(steps=1)
    step_parity.check_layers("padded", model, ids[:, :-1].to(device), ids[:, -1:].to(device), mask)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype):
    """As near to the float32 model with the same weights as the fused step of each alone is."""
    model = tiny("llama", dtype, mlp_bias=False)
    ids, mask = prompts()
    found, single = written(model, ids, mask)[0], alone(model, ids, mask, "fused")
    exact = alone(model.float(), ids, mask)
    for mine, other, want in zip(found, single, exact, strict=True):
        assert relative_error(mine, want) <= 1.5 * relative_error(other, want) + TOLERANCE[dtype] / 10


@torch.inference_mode()
def test_one_decoder_reads_prompts_of_any_lengths(monkeypatch):
    """One after another, with the same step, of which a graph may be captured: its tables lie where they lay. Only
    where prompts need more pages than there are it is made anew."""
    monkeypatch.setattr(step, "PAGE", 8)
    model = tiny("llama", mlp_bias=False)
    ids, mask = prompts()
    want, decoder = written(model, ids, mask)
    fused, tables = decoder.fused, [layer.table_BNM.data_ptr() for layer in decoder.cache.layers]
    fewer = torch.arange(40) >= torch.tensor([[30], [39], [8]])
    other, _ = written(model, ids, fewer, decoder=decoder)
    assert_close(other, alone(model, ids, fewer), torch.float32)
    assert decoder.fused is fused
    assert [layer.table_BNM.data_ptr() for layer in decoder.cache.layers] == tables
    whole, _ = written(model, ids, torch.ones_like(mask), decoder=decoder)
    assert_close(whole, alone(model, ids, torch.ones_like(mask)), torch.float32)
    assert decoder.fused is not fused
    assert torch.equal(written(model, ids, mask, decoder=decoder)[0], want)


@torch.inference_mode()
def test_pages_are_those_that_sequences_need(monkeypatch):
    """Padding takes none, and a window as many as it needs, whatever the length."""
    monkeypatch.setattr(step, "PAGE", 4)
    ids, mask = prompts()
    for window, each in ((None, [2, 6, 12]), (9, [2, 4, 4])):
        model = tiny("mistral", sliding_window=window)
        cache = written(model, ids, mask)[1].cache
        assert len(cache.pool.keys) == sum(each) * 2 * 2  # of two heads in two layers
        seen = [min(length + STEPS, window or 99) for length in LENGTHS]
        assert cache.bytes_read() == sum(seen) * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.inference_mode()
def test_rewinds(monkeypatch, family):
    """To where pages are left, and where a window has freed them by reading again."""
    monkeypatch.setattr(step, "PAGE", 4)
    model = tiny(family, **({"sliding_window": 5} if family == "mistral" else {"mlp_bias": False}))
    ids, mask = prompts(steps=12)
    want, decoder = written(model, ids, mask)
    for back in (2, 12):
        decoder.rewind(52 - back)
        again = [decoder.step(ids[:, i : i + 1]).clone() for i in range(52 - back, 52)]
        assert_close(torch.stack(again, 1), want[:, -back:], torch.float32)


@pytest.mark.parametrize("wrong", [
    [[1, 1, 0], [1, 1, 1]], [[0, 1, 0], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]], [[1, 1], [1, 1]],
])  # fmt: skip
def test_refuses_other_padding(wrong):
    decoder = Decoder(tiny("llama"), 5, batch=2)
    with pytest.raises(DataError, match="Pad on the left"):
        decoder.prefill(torch.full((2, 3), 5), torch.tensor(wrong))


def test_refuses_another_number_of_prompts():
    with pytest.raises(DataError, match="batch=3"):
        Decoder(tiny("llama"), 5, batch=2).prefill(torch.full((3, 4), 5))


def test_refuses_padding_where_the_rotary_embedding_depends_on_the_length():
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    ids, mask = prompts([2, 250], 20)
    with pytest.raises(DataError, match="one by one"):
        Decoder(model, 270, batch=2).prefill(ids[:, :250], mask)
