"""Files from strangers: whatever is in them, what comes out is a model or a SandcatError, and nothing changes."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import text, tiny, tokenizer

import sandcat
from sandcat.errors import CheckpointError, PlanError, SandcatError
from sandcat.methods import Cats, Coreinfer, Int8, Rsparse, Teal
from sandcat.models.view import ModelView
from sandcat.plans.plan import Plan

RECIPES = {
    "cats": [Cats(sparsity=0.5)],
    "coreinfer": [Coreinfer(rule="similarity", clusters=4)],
    "rsparse": [Rsparse(sparsity=0.3, alpha=[0.7])],
    "stack": [Int8(), Teal(sites=("q", "k", "v", "o")), Cats()],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**12, -1, 2**63, "0" * 5000, "../x", "model.layers.0.mlp", "\x1b[2J", "[/]", "²"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
slow = settings(
    deadline=5000, max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, recipe in RECIPES.items():
        model = tiny("llama")
        sandcat.sparsify(model, None, recipe, calibration=text())
        made[name] = sandcat.save(model, tokenizer(), tmp_path_factory.mktemp("models") / name)
        attempt(made[name])  # kernels are compiled now, so that the times of what follows are its own
    return made


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@st.composite
def damaged(draw, whole):
    """JSON data with one to three places changed, removed, or added to."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 4)):
                place = place[key]
                continue
            action = draw(st.sampled_from(["change", "change", "remove", "add"]))
            if action == "remove":
                del place[key]
            elif action == "add" and isinstance(place, dict):
                place[draw(st.text(max_size=10))] = draw(JSON)
            else:
                place[key] = draw(JSON)
            break
    return data


@contextmanager
def unchanged(*, load: Path | None = None):
    """Within it a SandcatError may come out, and nothing else; settings of torch and the files stay."""
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    files = {path: path.read_bytes() for path in load.iterdir()} if load else {}
    with suppress(SandcatError):
        yield
    assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before
    assert all(path.read_bytes() == content for path, content in files.items())


def attempt(folder: Path) -> None:
    with unchanged(load=folder):
        model, _ = sandcat.load(folder, device="cpu")
        assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, model.config.vocab_size)


def changed(folders, scratch, name: str, file: str, content: bytes) -> Path:
    folder = scratch / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[name], folder)
    (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", RECIPES)
@settings(slow, max_examples=150)
@given(data=st.data())
def test_plans(name, data, folders, capsys):
    """Read, matched with a model, and printed; a dense model that it is matched with stays as it is."""
    from sandcat.cli.printing import print_plan

    config = json.loads((folders[name] / "config.json").read_text())["quantization_config"]
    model = MODELS.setdefault("llama", tiny("llama"))
    modules = dict(model.named_modules())
    with unchanged():
        plan = Plan.from_config(data.draw(damaged(config)))
        if plan is not None:
            print_plan(plan)
            plan.match(ModelView(model))
            assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).recipe == plan.recipe
    assert dict(model.named_modules()) == modules
    assert "\x1b[2J" not in capsys.readouterr().out


MODELS: dict[str, torch.nn.Module] = {}


@slow
@given(data=st.data())
def test_configs(data, folders, scratch):
    name = data.draw(st.sampled_from([*RECIPES]))
    config = json.loads((folders[name] / "config.json").read_text())
    if data.draw(st.booleans()):  # else mostly the plan is hit, which is most of the file
        plan = config.pop("quantization_config")
        config = data.draw(damaged(config)) | {"quantization_config": plan}
    else:
        config = data.draw(damaged(config))
    attempt(changed(folders, scratch, name, "config.json", json.dumps(config).encode()))


@slow
@given(data=st.data())
def test_headers(data, folders, scratch):
    """Of a safetensors file: its JSON is changed, and its length with it, or its bytes."""
    name = data.draw(st.sampled_from([*RECIPES]))
    content = (folders[name] / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(damaged(json.loads(content[8 : 8 + length])))).encode()
        content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    else:
        bytes_ = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            bytes_[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
        content = bytes(bytes_[: data.draw(st.sampled_from([len(bytes_), 0, 4, 8 + length, len(bytes_) - 1]))])
    attempt(changed(folders, scratch, name, "model.safetensors", content))


@slow
@given(content=st.binary(max_size=64) | JSON.map(lambda data: json.dumps(data).encode()))
def test_any_bytes(content, folders, scratch):
    for file in ("config.json", "model.safetensors"):
        attempt(changed(folders, scratch, "cats", file, content))


def test_deep_json(folders, scratch):
    folder = changed(folders, scratch, "cats", "config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        sandcat.load(folder, device="cpu")


@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10**9), ("num_labels", 10**9), ("vocab_size", 2**40),
                                        ("intermediate_size", 10**9), ("num_hidden_layers", 3)])  # fmt: skip
def test_a_config_larger_than_its_files(key, value, folders, scratch):
    config = json.loads((folders["cats"] / "config.json").read_text()) | {key: value}
    folder = changed(folders, scratch, "cats", "config.json", json.dumps(config).encode())
    with pytest.raises(CheckpointError, match="the files hold"):
        sandcat.load(folder, device="cpu")


@pytest.mark.parametrize(
    "name, key, value",
    [("rsparse", "rank", 10**9), ("rsparse", "rank", -1), ("rsparse", "rank", "3"), ("coreinfer", "kept_neurons", 73)],
)
def test_a_plan_larger_than_its_model(name, key, value, folders, scratch):
    """Also where transformers loads it."""
    from transformers import AutoModelForCausalLM

    config = json.loads((folders[name] / "config.json").read_text())
    next(iter(config["quantization_config"]["methods"][0]["sites"].values()))[key] = value
    folder = changed(folders, scratch, name, "config.json", json.dumps(config).encode())
    for load in (sandcat.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(PlanError, match=rf"{key}|numbers"):
            load(folder)


def test_a_plan_that_claims_twice(folders):
    data = json.loads((folders["cats"] / "config.json").read_text())["quantization_config"]
    view = ModelView(tiny("llama"))
    with pytest.raises(PlanError, match="to two methods"):
        Plan.from_json({**data, "methods": data["methods"] * 2}).match(view)
    data["methods"][0]["sites"]["model.layers.0.mlp.up_proj"] = {}
    with pytest.raises(PlanError, match="does not change"):
        Plan.from_json(data).match(view)


@pytest.fixture
def sharded(folders, tmp_path):
    """A maker of folders whose index names a second file as it is told."""

    def make(name: str, second: Path | None = None) -> Path:
        folder = tmp_path / "sharded"
        shutil.copytree(folders["cats"], folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        part = {key: tensors.pop(key) for key in list(tensors)[:3]}
        save_file(tensors, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
        save_file(part, second or folder / name, {"format": "pt"})
        names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | dict.fromkeys(part, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return folder

    return make


def test_shards(sharded):
    assert sandcat.load(sharded("model-00002-of-00002.safetensors"), device="cpu")


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "sub/../../outside.safetensors", "..", ""])
def test_shards_elsewhere(name, sharded, tmp_path):
    outside = tmp_path / "outside.safetensors"
    folder = sharded(str(outside) if name == "ABSOLUTE" else name, outside)
    with pytest.raises(CheckpointError, match="nothing else is opened"):
        sandcat.load(folder, device="cpu")


def test_no_pickle(folders, tmp_path):
    """Weights in a pickle are not read. (That the sources load none, and eval nothing, is a rule of the linter.)"""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "pickled"
    shutil.copytree(folders["cats"], folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(CheckpointError, match="safetensors only"):
        sandcat.load(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_model_of_the_hub(folders, tmp_path, monkeypatch):
    """From a cache that holds it, without network, and only what is a model's."""
    commit, cache = "0" * 40, tmp_path / "cache"
    folder = cache / "models--some--one"
    shutil.copytree(folders["cats"], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model, _ = sandcat.load("some/one", device="cpu")
    assert type(model.model.layers[0].mlp).__name__ == "SparseMLP"
