"""transformers, accelerate, PEFT, GGUF and lm-eval on saved sparse folders (docs/integrations.md)."""

from __future__ import annotations

import json
import sys
import threading
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from conftest import assert_close
from tiny import VOCABULARY, text, tiny, tokenizer
from transformers import AutoModelForCausalLM, pipeline

import sandcat
from sandcat import adapters
from sandcat.errors import PlanError, UnsupportedModel
from sandcat.layers.sparse_module import sparse_modules

RECIPES = ("cats", "teal", "int8", "int8 teal", "sandcat")
IDS = torch.randint(4, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved folder of each recipe."""
    root = tmp_path_factory.mktemp("folders")

    @cache
    @torch.inference_mode(False)
    def folder(recipe: str) -> str:
        model = tiny("llama")
        target = "bytes=0.8" if recipe == "sandcat" else None
        sandcat.sparsify(model, None, recipe, target=target, calibration=text(4096 if target else 1024))
        return str(sandcat.save(model, tokenizer(), root / recipe.replace(" ", "-")))

    return folder


def loaded(folder: str, **options):
    """As anybody loads it; int8 alone by ours, as transformers reads it by compressed-tensors."""
    if folder.endswith("int8"):
        return sandcat.load(folder, device="cpu")[0]
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert sparse_modules(model)
    return model


WAYS = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted by layers of its own": {"assistant_early_exit": 1},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}
"""Ways of `generate` that must write what greedy decoding writes."""


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("kernels_pay")
@torch.inference_mode()
def test_generate(recipe, folders):
    model = loaded(folders(recipe))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False}
    greedy = model.generate(IDS, **options)
    for name, way in WAYS.items():
        assert torch.equal(model.generate(IDS, **options, **way), greedy), name
    assert torch.equal(model.generate(IDS, **options, assistant_model=tiny("llama")), greedy)
    assert model.generate(IDS, num_beams=3, **options).shape == greedy.shape
    for way in ({}, {"num_beams": 2}):
        torch.manual_seed(0)
        assert model.generate(IDS, max_new_tokens=6, do_sample=True, top_k=5, **way).shape == greedy.shape
    batch = tokenizer()(["Hello", "A longer prompt"], return_tensors="pt", padding=True)
    out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    alone = model.generate(batch["input_ids"][1:], **options)
    assert out[1].tolist() == alone[0].tolist()


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "int8"])
@torch.inference_mode()
def test_pipeline_and_loading(recipe, folders):
    folder = folders(recipe)
    for options in ({}, {"device_map": "auto"}):
        write = pipeline("text-generation", folder, **options)
        assert sparse_modules(write.model)
        assert len(write(["Hello", "a b"], batch_size=2, max_new_tokens=4, do_sample=False)) == 2
    want = loaded(folder)(IDS).logits
    assert torch.equal(loaded(folder, device_map="auto")(IDS).logits, want)
    for dtype in (torch.bfloat16, torch.float16):
        model = loaded(folder, dtype=dtype)
        assert model.dtype == dtype and model(IDS).logits.isfinite().all()
    assert loaded(folder, torch_dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", RECIPES)
@torch.inference_mode()
def test_compiled_whole(recipe, folders):
    """No graph break, for prompts and for steps."""
    torch.compiler.reset()  # what other tests compiled counts against a limit
    model = loaded(folders(recipe))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ids in (IDS, IDS[:, :1]):
        assert torch.equal(compiled(ids).logits, model(ids).logits)


LIMIT = 1.3
"""Memory while loading, of what the files hold; what is laid out for kernels is copied, a matrix at a time."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["cats", "teal"])
def test_shards_load_without_a_second_copy(recipe, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "head_dim": 128}
    model = tiny("llama", torch.bfloat16, **sizes)
    sandcat.sparsify(model, None, recipe, calibration=text(256))
    model.save_pretrained(tmp_path, max_shard_size="8MB")
    del model
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 4

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))

    loaded(str(tmp_path))  # what is imported on the way is not counted
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = loaded(str(tmp_path))
    done.set()
    watcher.join()
    assert most < LIMIT * sum(file.stat().st_size for file in files), most
    assert all(not parameter.is_meta for parameter in model.parameters())


def test_push_to_hub(folders, monkeypatch):
    """What would be uploaded is a folder that loads as the sparse model; nothing here reaches the hub."""
    from huggingface_hub import CommitOperationAdd
    from transformers.utils import hub

    seen = {}

    def upload(repo_id, operations, **options):
        seen[repo_id] = {o.path_in_repo: o.path_or_fileobj for o in operations if isinstance(o, CommitOperationAdd)}
        assert json.loads(Path(seen[repo_id]["config.json"]).read_text())["quantization_config"]["methods"]

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), create_commit=upload)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: SimpleNamespace(save=lambda _: None))
    loaded(folders("cats")).push_to_hub("somebody/cats")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(seen["somebody/cats"])


@pytest.mark.parametrize("recipe", ["cats", "teal", "int8 teal"])
@torch.inference_mode()
def test_offloaded_by_accelerate(recipe, folders, tmp_path):
    """A loaded model whose weights accelerate then keeps elsewhere gives the same logits."""
    want = [loaded(folders(recipe))(ids).logits for ids in (IDS, IDS[:, :1])]
    for offload in (accelerate.cpu_offload, lambda *a, **k: accelerate.disk_offload(*a, tmp_path, **k)):
        model = offload(loaded(folders(recipe)), execution_device=torch.device("cpu"))
        assert any(parameter.is_meta for parameter in model.parameters())
        for ids, logits in zip((IDS, IDS[:, :1]), want, strict=True):
            assert_close(model(ids).logits, logits, torch.float32)


@pytest.mark.parametrize("recipe", ["cats", "teal", "int8 teal"])
def test_loading_to_disk_is_refused(recipe, folders, tmp_path):
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for options in ({"device_map": where | {"model.layers.1": "disk"}},
                    {"device_map": "auto", "max_memory": {"cpu": "40KB"}}):  # fmt: skip
        with pytest.raises(PlanError, match="offloaded"):
            loaded(folders(recipe), offload_folder=tmp_path, **options)


def test_from_gguf(tmp_path):
    """A GGUF file, loaded by transformers, made sparse, saved and loaded as any other model."""
    gguf = pytest.importorskip("gguf")
    dense = tiny("llama", mlp_bias=False)
    config = dense.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        whole |= {f"model.layers.{layer}.{name}": f"blk.{layer}.{other}" for name, other in names.items()}
    for name, other in whole.items():
        writer.add_tensor(f"{other}.weight", dense.get_submodule(name).weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    again, _ = sandcat.load(sandcat.save(model, tokenizer(), tmp_path / "dense"), device="cpu")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    sandcat.sparsify(model, None, "cats", calibration=text())
    folder = sandcat.save(model, tokenizer(), tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(str(folder))(IDS).logits, model(IDS).logits)


PROJECTIONS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def adapted(recipe, targets=PROJECTIONS):
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    sandcat.sparsify(model, None, recipe, calibration=text())
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"))


@pytest.mark.parametrize("recipe", ["cats", "teal", "cats teal:sites=[q,k,v,o]", "teal:sites=[gate] cats"])
def test_lora_trains_under_the_masks_and_merges(recipe):
    model = adapters.follow_masks(adapted(recipe))
    kept = [module.threshold.clone() for module in sparse_modules(model).values()]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    with torch.inference_mode():
        want = [model(ids).logits for ids in (IDS, IDS[:, :1])]
        merged = adapters.merge(model.eval())
        for ids, logits in zip((IDS, IDS[:, :1]), want, strict=True):
            assert_close(merged(ids).logits, logits, torch.float32)
    after = [module.threshold for module in sparse_modules(merged).values()]
    assert len(after) == len(kept) and all(map(torch.equal, after, kept))


def test_the_masks_are_on_while_training():
    """A neuron that all tokens drop gets no gradient at any of its adapters' rows."""
    model = adapted("cats", ("down_proj",))
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.threshold[3] = torch.inf
    torch.nn.init.normal_(mlp.down_proj.lora_B["default"].weight)
    model(IDS, labels=IDS).loss.backward()
    gradient = mlp.down_proj.lora_A["default"].weight.grad
    assert gradient[:, 3].abs().max() == 0 and gradient.abs().max() > 0


def test_adapters_that_cannot_be():
    with pytest.raises(UnsupportedModel, match="int8 weights"):
        adapters.merge(adapted("int8 teal"))
    with pytest.raises(UnsupportedModel, match="rsparse"):
        adapters.follow_masks(adapted("rsparse:sparsity=0.3,alpha=[0.7]"))
    with pytest.raises(UnsupportedModel, match="coreinfer"):
        adapted("coreinfer")(IDS)


def test_the_models_of_lm_eval(folders, tmp_path, capsys, monkeypatch):
    """lm-eval's own command line, with the model `sandcat`, and with `hf` on a sparse folder."""
    pytest.importorskip("lm_eval")
    from lm_eval import tasks as lm_eval_tasks
    from lm_eval.__main__ import cli_evaluate

    from sandcat import lm_eval_model  # noqa: F401
    from sandcat.measuring.tasks import run_tasks

    quick = partial(lm_eval_tasks.TaskManager, include_defaults=False)  # the list of its own tasks takes seconds
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", quick)

    rows = [{"query": f"{a} then", "choices": [a, b], "gold": 0} for a in "abcdef" for b in "xyz"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "rows", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "rows.yaml").write_text(json.dumps(task))
    sparse, tok = sandcat.load(folders("cats"), device="cpu")
    [[want]] = run_tasks(sparse, [sparse], tok, [str(tmp_path / "rows.yaml")])
    for model in ("sandcat", "hf"):
        options = ["--model_args", f"pretrained={folders('cats')}", "--tasks", str(tmp_path / "rows.yaml")]
        output = ["--device", "cpu", "--output_path", str(tmp_path / model)]
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", model, *options, *output])
        cli_evaluate()
        [file] = (tmp_path / model).rglob("results*.json")
        assert json.loads(file.read_text())["results"]["rows"]["acc,none"] == want.sparse
