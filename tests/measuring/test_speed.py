"""The benchmark's counting and its gate; times themselves are not tested."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import text, tiny
from torch import nn

import sandcat
from sandcat.errors import ParityError
from sandcat.layers.op_module import kernels_of
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring import speed
from sandcat.measuring.bytes_read import read_bytes, step_bytes
from sandcat.measuring.parity import parity_error


@pytest.fixture
def pair():
    dense = tiny("llama", tie_word_embeddings=False, mlp_bias=False)
    sparse = copy.deepcopy(dense)
    sandcat.sparsify(sparse, None, "cats", calibration=text())
    return dense, sparse


@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_bytes_of_a_step(pair):
    dense, sparse = pair
    ids = torch.randint(4, 96, (2, 10))
    weights = sum(p.nbytes for p in dense.parameters()) - dense.model.embed_tokens.weight.nbytes
    cache = 2 * 2 * 2 * 2 * 10 * 8 * 4  # keys and values, layers, sequences, heads, tokens, size, bytes
    assert step_bytes(dense, ids) == weights + cache
    kept = []
    for module in sparse_modules(sparse).values():
        module.register_forward_pre_hook(lambda m, args: kept.append(int(m.kept(args[0][:, -1]).any(0).sum())))
    sparse(ids)
    dropped = sum(72 - count for count in kept[-2:])
    thresholds = 2 * 72 * 4
    assert step_bytes(sparse, ids) == weights + cache + thresholds - dropped * 2 * 32 * 4


@pytest.mark.parametrize("recipe", ["int8 cats", "fp8 cats:batch=shared", "int8 teal:sparsity=0.5"])
@torch.inference_mode()
def test_codes_are_counted_once(pair, recipe):
    """What each format's own layers read, less the bytes of the units that are dropped, of one byte a weight."""
    dense, _ = pair
    whole, sparse = copy.deepcopy(dense), copy.deepcopy(dense)
    sandcat.sparsify(whole, None, recipe.split()[0])
    sandcat.sparsify(sparse, None, recipe, calibration=text())
    ids, dropped = torch.randint(4, 96, (1, 10)), []

    def count(module, args):
        size = getattr(module, "out_features", 2 * 32)  # of an MLP's neuron: a row of up, one of down
        dropped.append(size * int((~module.kept(args[0][:, -1])).sum()))

    for module in sparse_modules(sparse).values():
        module.register_forward_pre_hook(count)
    sparse(ids)
    thresholds = sum(module.threshold.nbytes for module in sparse_modules(sparse).values())
    expected = step_bytes(whole, ids) + thresholds - sum(dropped)
    assert step_bytes(sparse, ids) == expected


@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_bytes_of_a_batch(pair):
    """Shared lists read what one sequence reads; above what pays everything is read, and the report says so."""
    dense, sparse = pair
    shared = copy.deepcopy(dense)
    sandcat.sparsify(shared, None, "cats:batch=shared", calibration=text())
    ids = torch.randint(4, 96, (8, 10), generator=torch.Generator().manual_seed(0))
    own, common = (step_bytes(model, ids) for model in (sparse, shared))
    alone = sum(step_bytes(sparse, ids[i : i + 1]) for i in range(8)) / 8
    cache = 2 * 2 * 2 * 10 * 8 * 4
    assert common - 8 * cache == pytest.approx(alone - cache, rel=0.02) and own > 1.1 * common
    many = torch.randint(4, 96, (17, 30), generator=torch.Generator().manual_seed(0))
    thresholds = 2 * 72 * 4
    assert step_bytes(shared, many) == step_bytes(dense, many) + thresholds
    found = speed.benchmark(dense, shared, many, steps=3, runs=1, compile=False)
    assert found.kernel == "masked" and found.parity_error == 0
    assert speed.benchmark(dense, shared, many[:4], steps=3, runs=1, compile=False).kernel == "numba"


def test_the_report_says_above_which_batch_a_step_is_masked(pair, monkeypatch):
    from sandcat.ops import pays

    dense, sparse = pair
    assert kernels_of(sparse) == {"sparse_mlp": "numba, masked above batch 1"}
    assert kernels_of(dense) == {}
    table = {(op, "cpu", torch.float32, "float"): (2, 4) for op in ("shared_linear", "shared_up_down")}
    monkeypatch.setattr(pays, "_MOST_TOKENS", table)
    monkeypatch.setattr(pays, "LARGE", 32 * 32)
    shared = copy.deepcopy(dense)
    sandcat.sparsify(shared, None, "teal:batch=shared", calibration=text())
    assert kernels_of(shared) == {"shared_linear": "numba, masked above batch 2 to 4", "sparse_linear": "numba"}


def test_a_tied_head_is_read(pair):
    tied = tiny("llama", tie_word_embeddings=True)
    assert read_bytes(tied) == sum(p.nbytes for p in tied.parameters())


def test_pairs(pair):
    dense, sparse = pair
    found = speed.benchmark(dense, sparse, torch.randint(4, 96, (1, 30)), steps=3, runs=2, compile=False)
    assert found.context == 27 and found.kernel == "numba" and found.parity_error < 1e-5
    assert set(found.variants) == {"dense eager", "dense fused", "sparse eager", "sparse fused"}
    assert found.gain == found.dense_seconds / found.sparse_seconds
    assert found.allowed_gain == found.dense_bytes / found.sparse_bytes > 1


def test_nothing_is_timed_if_the_kernel_is_wrong(pair, monkeypatch):
    dense, sparse = pair
    from sandcat.layers import sparse_mlp as mlp

    right = mlp.sparse_mlp
    monkeypatch.setattr(mlp, "sparse_mlp", lambda *args: right(*args) * 1.01)
    with pytest.raises(ParityError, match="differs from its reference"):
        speed.benchmark(dense, sparse, torch.randint(4, 96, (1, 30)), steps=3, runs=2, compile=False)


@pytest.mark.parametrize("mode, name", [("default", "dense compiled step"), ("fused", "dense fused step")])
def test_nothing_is_timed_if_a_step_is_wrong(pair, monkeypatch, mode, name):
    right = speed.Decoder.step

    def wrong(self, ids):
        return right(self, ids) * (1.1 if self.compile == mode else 1)

    monkeypatch.setattr(speed.Decoder, "step", wrong)
    with pytest.raises(ParityError, match=f"{name} differs"):
        speed.benchmark(*pair, torch.randint(4, 96, (1, 30)), steps=3, runs=2)


def test_an_activation_on_its_threshold_is_no_error(pair, monkeypatch):
    """A kernel that decides it the other way is right too; the thresholds are back afterwards."""
    _, sparse = pair
    ids = torch.randint(4, 96, (1, 30))
    module = next(iter(sparse_modules(sparse).values()))
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(m.activations(args[0][:, -1])[0].abs()))
    with torch.inference_mode():
        sparse(ids)
    handle.remove()
    module.threshold[seen[-1].argmax()] = seen[-1].max() * (1 + 1e-7)
    before = module.threshold.clone()
    from sandcat.layers import sparse_mlp as mlp

    right = mlp.sparse_mlp
    monkeypatch.setattr(mlp, "sparse_mlp", lambda *args: right(*args[:4], args[4] * (1 - 1e-6), *args[5:]))
    assert parity_error(sparse, ids) < 1e-5
    assert torch.equal(module.threshold, before)


@torch.inference_mode()
def test_the_published_way_that_ours_is_timed_against(monkeypatch):
    """On a CPU its layers run their definition: what is tested is which weights and inputs they get."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import teal_published

    model = tiny("qwen2", tie_word_embeddings=False)
    sandcat.sparsify(model, None, "teal", calibration=text())
    published = teal_published.as_published(model)
    assert not sum(type(module) is nn.Linear for module in published.model.modules())
    assert {p.data_ptr() for p in published.parameters()} == {p.data_ptr() for p in model.parameters()}
    ids, launches = torch.randint(4, 96, (1, 20)), []
    run = teal_published.teal
    monkeypatch.setattr(teal_published, "teal", lambda *args: launches.append(len(args[1])) or run(*args))
    found = speed.prepared_steps("published", published, ids, 4, {"eager": None})["published eager"]
    assert launches == 2 * [3, 1, 1, 1, 1]  # layers of q, k and v together, o, gate, up, down
    want = speed.prepared_steps("teal", model, ids, 4, {"eager": None})["teal eager"]
    torch.testing.assert_close(found.step(ids[:, -1:]), want.step(ids[:, -1:]), rtol=1e-4, atol=1e-5)
