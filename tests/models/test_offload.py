"""Calibrating on a device that holds one layer at a time: the same plan, few layers there at once, all put back."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, text, tiny, tokenizer

import sandcat
from sandcat import cli
from sandcat.methods import Teal
from sandcat.models import offload
from sandcat.models.view import ModelView

WORDS = text(1024)
ELSEWHERE = "cpu:0"  # not the device "cpu" that the model is on, and able to compute


class Moves:
    """Stands for a device: copies what is moved to it, and counts which stages lie there."""

    def __init__(self, model):
        view = ModelView(model)
        stages = range(len(view.layers) + 1)
        self.home = {t: t.data_ptr() for stage in stages for part in view.parts(stage) for t in part.parameters()}
        self.stages = [[t for part in view.parts(stage) for t in part.parameters()] for stage in stages]
        self.count, self.most = 0, 0

    def __call__(self, data, device):
        assert device == torch.device(ELSEWHERE)
        self.count += 1
        self.most = max(self.most, len(self.away()))
        return data.clone()

    def away(self):
        return [i for i, part in enumerate(self.stages) if any(t.data_ptr() != self.home[t] for t in part)]


@pytest.fixture
def moves(monkeypatch):
    def watch(model):
        watcher = Moves(model)
        monkeypatch.setattr(offload, "move", watcher)
        return watcher

    return watch


def both(moves, family, recipe, **options):
    """The model sparsified where it is, and layer by layer; and what was moved for the second."""
    options = {"calibration": WORDS, **options}
    model = tiny(family, num_hidden_layers=4)
    plain, streamed = copy.deepcopy(model), model
    plan = sandcat.sparsify(plain, None, recipe, **options)
    seen = moves(streamed)
    assert sandcat.sparsify(streamed, None, recipe, device=ELSEWHERE, **options) == plan
    found = streamed.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, found[name]), name
    return seen


@pytest.mark.parametrize(
    "recipe, options",
    [
        ("cats:score=output", {}),
        ("teal:sites=all+head", {"sequential": False}),
        ("int8:clip=search teal", {}),
        ("coreinfer:rule=similarity,clusters=3", {}),
        ("relufy", {}),
        ("int8 teal:sites=all+head", {"target": "bytes=0.2"}),
        ("teal", {"target": "sparsity=0.3", "allocate": "equal-error"}),
        ("cats", {"target": "quality=ppl+5%"}),
    ],
)
def test_the_same_plan(moves, recipe, options):
    seen = both(moves, "llama", recipe, **options)
    assert seen.count > 0
    # While losses are measured, norm and head stay there beside a layer.
    assert seen.most <= (2 if options.get("allocate", "search") == "search" and "target" in options else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_plan_on_every_family(moves, family):
    """By a search, which runs layers forward and backward, where names, fused projections or a wrapper differ; else in
    one pass."""
    if family in ("llama", "phi3", "gemma3"):
        assert both(moves, family, "sandcat", target="bytes=0.75").most <= 2
    else:
        assert both(moves, family, "teal").most <= 1


def test_all_is_put_back_when_something_fails(moves, monkeypatch):
    model = tiny("llama", num_hidden_layers=4)
    seen, modules = moves(model), dict(model.named_modules())
    decide, calls = Teal.decide, []

    def fail(self, *args):
        calls.append(seen.away())
        if len(calls) == 10:
            raise MemoryError("the device is full")
        return decide(self, *args)

    monkeypatch.setattr(Teal, "decide", fail)
    for options in ({}, {"target": "bytes=0.8"}):
        calls.clear()
        with pytest.raises(MemoryError):
            sandcat.sparsify(model, None, "teal", calibration=WORDS, device=ELSEWHERE, **options)
        assert calls[-1] != []
        assert seen.away() == [] and dict(model.named_modules()) == modules
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


@torch.inference_mode()
def test_a_whole_model_runs_layer_by_layer(moves):
    for family in ("llama", "gemma3"):
        model = tiny(family, num_hidden_layers=4)
        view, ids = ModelView(model, torch.device(ELSEWHERE)), torch.randint(4, 96, (2, 9))
        want = model(ids).logits
        seen = moves(model)
        with offload.streaming(view):
            assert torch.equal(model(ids).logits, want)
        assert seen.count and seen.most == 2 and seen.away() == []
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_command_line(moves, tmp_path, capsys):
    folder = sandcat.save(tiny("llama"), tokenizer(), tmp_path / "dense")
    words = tmp_path / "words.txt"
    words.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    given = ["sparsify", str(folder), "teal", "--calibration", str(words), "--no-measure", "--offload"]

    def main(*more):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr("sys.argv", ["sandcat", *given, *more])
            cli.main()
        return stop.value.code

    used = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "move", lambda data, device: used.append(str(device)) or data.clone())
        assert main("--device", ELSEWHERE, "-o", str(tmp_path / "out")) == 0
    assert set(used) == {ELSEWHERE}
    model, _ = sandcat.load(tmp_path / "out", device="cpu", require_plan=True)
    plain = sandcat.load(folder, device="cpu")[0]
    plan = sandcat.sparsify(plain, tokenizer(), "teal", calibration=str(words))
    assert sandcat.checkpoints.quantizer.plan_of(model) == plan
    assert main("--device", "cpu", "-o", str(tmp_path / "other")) == 2
    assert "--offload brings layers" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("recipe, options", [("teal:sites=all+head", {}), ("int8 cats", {"target": "bytes=0.2"})])
def test_memory_of_a_gpu(recipe, options):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 2048}
    model = tiny("llama", **sizes, tie_word_embeddings=False)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sandcat.sparsify(model, None, recipe, calibration=text(1024), device="cuda", **options)
    activations = 1024 * 4096 * 4 * 4  # float32, of all tokens at the widest site: inputs, scores and what ranks them
    assert torch.cuda.max_memory_allocated() - before < 3 * layer + activations
    assert torch.cuda.memory_allocated() - before < layer
    assert {p.device.type for p in model.parameters()} == {"cpu"}
