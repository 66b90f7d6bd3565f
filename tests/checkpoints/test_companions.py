"""What lies beside a model's weights and config comes along when it is saved."""

from __future__ import annotations

import json

import pytest
from huggingface_hub.utils import filter_repo_objects
from tiny import text, tiny, tokenizer
from transformers import AutoModelForCausalLM, Gemma3ImageProcessor

import sandcat
from sandcat.checkpoints import files

COMING = {
    "processor_config.json": '{"image_seq_length": 4}',
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "tokenizer.model": "sentences",
    "LICENSE": "Licence of the source",
    "GEMMA_LICENSE.pdf.txt": "terms",
    "NOTICE": "Notice",
    "USE_POLICY.md": "Policy",
    "modeling_own.py": "raise RuntimeError('nobody said that this may run')",
}
STAYING = {
    "README.md": "# The source",
    "pytorch_model.bin": "weights",
    "model.onnx": "weights",
    "pytorch_model.bin.index.json": "{}",
    "model.safetensors.index.fp32.json.gz": "weights",
    "report.json": "{}",
    "special_tokens_map.json": '{"eos_token": "old"}',
    "added_tokens.json": '{"old": 0}',
    "trainer_state.json": "{}",
    "training.jsonl": "data",
    ".gitattributes": "",
}


@pytest.fixture(params=["llama", "gemma3"])
def source(request, tmp_path):
    folder = sandcat.save(tiny(request.param), tokenizer(), tmp_path / "source")
    Gemma3ImageProcessor().save_pretrained(folder)
    for name, content in (COMING | STAYING).items():
        (folder / name).write_text(content)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def made(source, folder, **options):
    model, tok = sandcat.load(source, device="cpu")
    sandcat.sparsify(model, tok, "cats", calibration=text())
    return sandcat.save(model, tok, folder, **options)


def test_companions(source, tmp_path):
    own = names(sandcat.save(tiny("llama"), tokenizer(), tmp_path / "none"))
    folder = made(source, tmp_path / "out")
    assert names(folder) == own | set(COMING) | {"preprocessor_config.json"}
    for name in (*COMING, "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert (folder / name).stat().st_mode == (folder / "config.json").stat().st_mode
    assert (folder / "README.md").read_text() != STAYING["README.md"]
    assert Gemma3ImageProcessor.from_pretrained(folder).size == Gemma3ImageProcessor().size
    again = made(source, folder, overwrite=True)
    assert names(again) == names(folder)


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_a_folder_written_over_itself(source):
    """Its companions are still its own."""
    model, tok = sandcat.load(source, device="cpu")
    sandcat.sparsify(model, tok, "cats", calibration=text())
    assert set(COMING) < names(sandcat.save(model, tok, source, overwrite=True))


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_what_is_not_copied(source, tmp_path):
    """Links out of the folder, whoever made them; vocabularies, where the tokenizer is another one; what is gone."""
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (source / "notes.txt").symlink_to(secret)
    (source / "inside.txt").symlink_to(source / "NOTICE")
    model, tok = sandcat.load(source, device="cpu")
    found = names(sandcat.save(model, tok, tmp_path / "out"))
    assert "notes.txt" not in found and {"inside.txt", "tokenizer.model"} < found
    assert "tokenizer.model" not in names(sandcat.save(model, tokenizer(), tmp_path / "other"))
    source.rename(tmp_path / "moved")
    assert "LICENSE" not in names(sandcat.save(model, tok, tmp_path / "gone"))


@pytest.mark.parametrize("source", ["llama"], indirect=True)
def test_from_the_hub(source, tmp_path, monkeypatch):
    """From its cache, whose snapshots are links; without network here. Loaded by transformers, under its name."""
    commit, cache = "0" * 40, tmp_path / "cache"
    home = cache / "models--some--one"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "blobs").mkdir()
    (home / "snapshots" / commit).mkdir(parents=True)
    for number, path in enumerate(path for path in source.iterdir() if path.is_file()):
        path.rename(home / "blobs" / str(number))
        (home / "snapshots" / commit / path.name).symlink_to(home / "blobs" / str(number))
    for module in ("huggingface_hub", "transformers.utils.hub"):
        for name in ("constants.HF_HUB_CACHE", "HF_HUB_CACHE"):
            monkeypatch.setattr(f"{module}.{name}", str(cache), raising=False)
    model = AutoModelForCausalLM.from_pretrained("some/one", cache_dir=str(cache))
    assert model.config.name_or_path == "some/one"
    assert set(COMING) - {"tokenizer.model"} < names(sandcat.save(model, tokenizer(), tmp_path / "out"))
    model.config.name_or_path = "some/other"
    assert "LICENSE" not in names(sandcat.save(model, tokenizer(), tmp_path / "none"))


def test_what_is_fetched(tmp_path, monkeypatch):
    """Of a repository: texts, licences, named templates, and the weights that the index names."""
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-[2].safetensors"}})
    repository = {
        "config.json": "{}", "model.safetensors.index.json": index, "model-1.safetensors": "",
        "model-[2].safetensors": "", "model-2.safetensors": "", "original/consolidated.pth": "",
        "onnx/config.json": "", "pytorch_model.bin": "",
        "additional_chat_templates/tool_use.jinja": "", "LICENSE": "", "qwen.tiktoken": "",
    }  # fmt: skip

    def download(name, **patterns):
        patterns.pop("revision", None)
        for file in filter_repo_objects(repository, **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(repository[file])
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    files.fetch("some/one")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    other = {"model-2.safetensors", "original/consolidated.pth", "onnx/config.json", "pytorch_model.bin"}
    assert found == repository.keys() - other


def test_remote_code_is_still_where_the_config_says(tmp_path):
    """A config that names its own code has that code beside it, before and after."""
    source = sandcat.save(tiny("llama"), tokenizer(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (source / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM): ...\n"
    (source / "modeling_own.py").write_text(code)
    folder = made(source, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()).get("auto_map") == config["auto_map"]
    assert (folder / "modeling_own.py").read_text() == code
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
