"""A model is saved as what its plan builds, or not at all; and a state that the caller gives is what is saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, text, tiny, tokenizer

import sandcat
from sandcat.errors import PlanError, UnsupportedModel

IDS = torch.randint(4, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(3))
HEAD = "teal:sites=all+head"


def sparse(recipe: str = "cats", **changes) -> torch.nn.Module:
    model = tiny("llama", **changes)
    sandcat.sparsify(model, None, recipe, calibration=text())
    return model


def written(model, folder, **options):
    """What `save_pretrained` writes, loaded again."""
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return sandcat.load(folder, device="cpu")[0]


def new_head(model):
    model.set_output_embeddings(torch.nn.Linear(32, VOCABULARY, bias=False))


def resize(model):
    model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)


def compile_a_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])


def a_dense_mlp(model):
    model.model.layers[1].mlp = tiny("llama").model.layers[1].mlp


def half_resized(model):
    with pytest.raises(TypeError):
        resize(model)  # the table, and then not our head


CHANGES = {
    "resized": (HEAD, False, resize, "lm_head"),
    "another head": (HEAD, False, new_head, "lm_head"),
    "another head, tied": (HEAD, True, new_head, "lm_head"),
    "another head, int8": ("int8", True, new_head, "lm_head"),
    "half resized": ("int8", False, half_resized, "embed_tokens"),
    "a dense mlp": ("cats", True, a_dense_mlp, r"layers\.1\.mlp"),
    "a dense mlp without tensors of its own": ("coreinfer", True, a_dense_mlp, r"layers\.1\.mlp"),
    "another threshold": ("cats", True, lambda model: model.model.layers[0].mlp.threshold.mul_(2), "threshold"),
    "fewer layers": ("cats", True, lambda model: model.model.layers.pop(1), "layers"),
    "a compiled layer": ("cats", True, compile_a_layer, "layers"),
    "another config": ("cats", True, lambda model: setattr(model.config, "vocab_size", 90), "embed_tokens"),
    "the plan taken out": ("cats", True, lambda model: delattr(model.config, "quantization_config"), "plan"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_that_no_longer_fits(change, tmp_path):
    recipe, tied, apply, where = CHANGES[change]
    model = sparse(recipe, tie_word_embeddings=tied)
    with torch.no_grad():
        apply(model)
    for save in (lambda: model.save_pretrained(tmp_path / "out"),
                 lambda: sandcat.save(model, tokenizer(), tmp_path / "out")):  # fmt: skip
        with pytest.raises(PlanError, match=where):
            save()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe, tied, change",
    [
        ("cats", False, resize),
        ("cats", True, resize),
        (HEAD, True, resize),  # the head is the table, and follows
        ("cats", False, new_head),
        ("int8", True, lambda model: model.tie_weights()),  # as lm-eval does
        (f"int8 {HEAD}", True, lambda model: model.tie_weights()),
        (HEAD, True, lambda model: model.tie_weights()),
    ],
)
@torch.no_grad()
def test_changes_that_fit(recipe, tied, change, tmp_path):
    model = sparse(recipe, tie_word_embeddings=tied)
    change(model)
    assert torch.equal(written(model, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("recipe", ["cats", "int8", HEAD])
def test_a_given_state_is_saved(recipe, tmp_path):
    """Averaged weights, say; also where the head is stored by channels, and the table with it."""
    model = sparse(recipe, tie_word_embeddings=True)
    for number, copied in enumerate((torch.clone, lambda tensor: tensor)):
        state = {name: copied(tensor) for name, tensor in model.state_dict().items()}
        state["model.norm.weight"] = state["model.norm.weight"] + 1
        again = written(model, tmp_path / str(number), state_dict=state)
        assert torch.equal(again.model.norm.weight, model.model.norm.weight + 1)
        assert "model.norm.weight" in state  # the caller's own is left to him
    size = (tmp_path / "1" / "model.safetensors").stat().st_size
    assert size == (written(model, tmp_path / "2"), (tmp_path / "2" / "model.safetensors").stat().st_size)[1]


def test_a_given_state_that_loading_would_refuse(tmp_path):
    model = sparse()
    with pytest.raises(PlanError, match="threshold"):
        model.save_pretrained(tmp_path, state_dict=tiny("llama").state_dict())
    model.save_pretrained(tmp_path, state_dict={}, is_main_process=False)  # what other processes give: nothing


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_saves_itself(copied, tmp_path):
    other = copied(model := sparse())
    with torch.no_grad():
        other.model.norm.weight += 1
    assert torch.equal(written(other, tmp_path).model.norm.weight, model.model.norm.weight + 1)


def test_loaded_models_too(tmp_path):
    model = written(sparse(), tmp_path / "one")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] += 1
    again = written(model, tmp_path / "two", state_dict=state)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight + 1)
    new_head(model)
    model.model.layers[0].mlp = tiny("llama").model.layers[0].mlp
    with pytest.raises(PlanError, match=r"layers\.0\.mlp"):
        model.save_pretrained(tmp_path / "three")


class TestAdapters:
    def adapted(self, model):
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    @pytest.mark.parametrize("make", [sparse, lambda: tiny("llama")])
    def test_save(self, make, tmp_path):
        """The wrapper, and the model in which it has put its layers."""
        model = self.adapted(make())
        for unmerged in (model, model.get_base_model()):
            with pytest.raises(UnsupportedModel, match=r"q_proj.*Merge"):
                sandcat.save(unmerged, tokenizer(), tmp_path / "out")
        merged = model.merge_and_unload()
        sandcat.load(sandcat.save(merged, tokenizer(), tmp_path / "merged"), device="cpu")

    def test_sparsify(self):
        model = self.adapted(tiny("llama"))
        for unmerged in (model, model.get_base_model()):
            for recipe in ("cats", "teal"):  # cats would leave q alone
                with pytest.raises(UnsupportedModel, match=r"q_proj.*Merge"):
                    sandcat.sparsify(unmerged, None, recipe, calibration=text())
        sandcat.sparsify(model.merge_and_unload(), None, "cats", calibration=text())

    def test_adapters_alone(self, tmp_path):
        """As transformers and PEFT save them: nothing of the model is in the files."""
        peft = pytest.importorskip("peft")
        self.adapted(sparse()).save_pretrained(tmp_path / "wrapped")
        model = sparse()
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "inside")
        for folder in ("wrapped", "inside"):
            assert all("lora" in name for name in load_file(tmp_path / folder / "adapter_model.safetensors"))

    def test_prompts(self, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny("llama"), config)
        with pytest.raises(UnsupportedModel, match="Merge"):
            sandcat.save(model, tokenizer(), tmp_path / "out")


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_wrappers(wrap, tmp_path):
    """A plan made on one would name its modules by the wrapper's names."""
    model = wrap(tiny("llama"))
    with pytest.raises(UnsupportedModel, match="inside"):
        sandcat.sparsify(model, None, HEAD, calibration=text())
    with pytest.raises(UnsupportedModel, match="inside"):
        sandcat.save(model, tokenizer(), tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_callers_config(family, tmp_path):
    """A model built from it, or a second one, is not told of the plan, nor that the head is no longer the table."""
    kind, config = type(model := tiny(family, tie_word_embeddings=True)), copy.deepcopy(model.config)
    before = config.to_dict()
    for _ in range(2):
        model = kind(config)
        sandcat.sparsify(model, None, "int8", calibration=text())
        assert config.to_dict() == before
        assert model.config.quantization_config is not None
        assert all(module.config is not config for module in model.modules() if hasattr(module, "config"))
    dense = kind(config)
    dense.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert torch.equal(sandcat.load(tmp_path, device="cpu")[0](IDS).logits, dense.eval()(IDS).logits)
