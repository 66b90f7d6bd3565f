"""The command line: what it prints, and every mistake it explains (exit code 2, nothing written)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from command_line import main
from tiny import tiny, tokenizer

import sandcat
from sandcat import METHODS

TEXT = "The quick brown fox jumps over the lazy dog, and 12 cats sleep. "


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "dense"
    return sandcat.save(tiny("llama"), tokenizer(), folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "other.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT[::-1]}"}) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def sparse(dense, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sparse"
    assert main("sparsify", dense, "cats:sparsity=0.4", "-o", folder, "--calibration", words, "--no-measure") == 0
    return folder


def snapshot(folder: Path):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_sparsify_measures_and_reports(dense, words, other, tmp_path, capsys):
    folder = tmp_path / "out"
    code = main(
        "sparsify", dense, "cats:sparsity=0.4,score=output", "-o", folder, "--calibration", words, "--text", other,
        "--tokens", 512, "--curve", "0.2,0.6", "--prompt", "Hello", "--runs", 2, "--no-compile",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    assert "report.html" in said
    report = json.loads((folder / "report.json").read_text())
    assert report["text"][0]["ratio"] > 0
    assert [round(layer["target"], 2) for layer in report["sparsity"]] == [0.4, 0.4]
    assert [point["sparsity"] for point in report["curve"]] == [0.2, 0.4, 0.6]
    assert report["curve"][0]["bytes_ratio"] > report["curve"][2]["bytes_ratio"]
    assert report["curve"][1]["perplexity_ratio"] == report["text"][0]["ratio"]
    assert report["speed"][0]["dense_bytes"] > report["speed"][0]["sparse_bytes"]
    assert report["samples"][0]["prompt"] == "Hello"
    assert report["calibration"]["tokens"] > 256
    assert "Measured on this saved model" in (folder / "README.md").read_text()
    assert sandcat.load(folder, device="cpu")[0](torch.tensor([[5]])).logits.isfinite().all()


def test_dry_run_prints_the_plan_and_writes_nothing(dense, words, tmp_path, capsys):
    before = snapshot(dense)
    assert main("sparsify", dense, "cats", "--calibration", words, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["methods"][0]["sites"]) == 2
    assert main("sparsify", dense, "cats", "--calibration", words, "--dry-run", "-o", tmp_path / "out") == 0
    assert "model.layers.1.mlp" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []
    assert snapshot(dense) == before


def test_a_budget(dense, words, other, tmp_path, capsys):
    """The default recipe; the budget is in the plan, in the report and in what `show` says."""
    folder = tmp_path / "out"
    options = ["--calibration", words, "--text", other, "--tokens", 512, "--runs", 2, "--no-compile"]
    assert main("sparsify", dense, "-o", folder, "--bytes", 0.7, *options) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["recipe"].endswith("--bytes 0.7 --allocate search")
    budget = report["plan"]["budget"]
    assert (budget["target"], budget["allocate"], round(budget["bytes"], 3)) == ("bytes=0.7", "search", 0.7)
    assert any(row["layer"] is None and row["realised"] > 0 for row in report["sparsity"])
    assert "bytes=0.7" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert main("show", folder) == 0
    assert "bytes=0.7 by search: 0.700 of the dense model's weights are read" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main("sparsify", dense, "--calibration", words, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["budget"]["target"] == "quality=ppl+1%"


def test_show_and_methods(sparse, capsys):
    assert main("show", sparse) == 0
    said = capsys.readouterr().out
    assert "cats:sparsity=0.4" in said and "words.txt" in said
    assert main("show", sparse, "--json") == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 1
    assert main("methods") == 0
    assert "sparsity" in capsys.readouterr().out
    assert main("methods", "--json") == 0
    assert {method["name"] for method in json.loads(capsys.readouterr().out)} == {m.name for m in METHODS}


def test_generate(sparse, capsys, monkeypatch):
    assert main("generate", sparse, "Hello", "--max-new-tokens", 5) == 0
    text = capsys.readouterr().out
    assert main("generate", sparse, "Hello", "--max-new-tokens", 5, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == text.rstrip("\n")
    assert main("generate", sparse, "Hello", "--max-new-tokens", 5, "--temperature", 0.8, "--top-k", 5) == 0


def test_eval_and_bench(sparse, other, tmp_path, capsys):
    folder = tmp_path / "report"
    evaluate = ["eval", sparse, "--text", other, "--tokens", 512, "--batch", "1,2", "--json", "--report", folder]
    assert main(*evaluate) == 0
    found = json.loads(capsys.readouterr().out)
    assert [text["batch"] for text in found["text"]] == [1, 2]
    assert found["text"][0]["tokens"] > 200 and not found["speed"]
    assert (folder / "report.html").exists()
    assert (
        main("bench", sparse, "--batch", "1,3", "--context", 20, "--steps", 4, "--runs", 2, "--no-compile", "--json")
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [speed["batch"] for speed in found["speed"]] == [1, 3]
    assert not found["text"]
    assert main("bench", sparse, "--context", 20, "--steps", 4, "--runs", 2, "--no-compile") == 0


@pytest.fixture
def broken(dense, sparse, tmp_path):
    """A maker of damaged copies: broken("truncated") and so on."""
    import shutil

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(sparse, folder)
        config = json.loads((folder / "config.json").read_text())
        plan = config["quantization_config"]
        weights = folder / "model.safetensors"
        if kind == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif kind == "corrupt":
            weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
        elif kind == "no-weights":
            weights.unlink()
        elif kind == "not-json":
            (folder / "config.json").write_text("{")
        elif kind == "list":
            config = []
        elif kind == "newer":
            plan["format_version"] = 99
        elif kind == "misfit":
            plan["methods"][0]["sites"]["model.layers.7.mlp"] = {}
        elif kind == "remote-code":
            config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
            config["model_type"] = "evil"
        elif kind == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            model = GPT2LMHeadModel(
                GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=96, bos_token_id=1, eos_token_id=2)
            )
            sandcat.save(model, tokenizer(), folder, overwrite=True)
            return folder
        if kind != "not-json":
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


BAD = [
    ("unknown method", ["sparsify", "DENSE", "cts", "-o", "OUT"], "did you mean 'cats'"),
    ("unknown option", ["sparsify", "DENSE", "cats:sparsty=0.5", "-o", "OUT"], "did you mean 'sparsity'"),
    ("sparsity 1", ["sparsify", "DENSE", "cats:sparsity=1.0", "-o", "OUT"], "outside [0, 1)"),
    ("one slot", ["sparsify", "DENSE", "cats", "relufy", "-o", "OUT"], "both want the input"),
    ("no output", ["sparsify", "DENSE", "cats"], "with -o"),
    ("sparse already", ["sparsify", "SPARSE", "cats", "-o", "OUT"], "already has a plan"),
    ("no such folder", ["sparsify", "./nowhere", "cats", "-o", "OUT"], "no model folder"),
    ("folder without a model", ["sparsify", "EMPTY", "cats", "-o", "OUT"], "no model folder"),
    ("unsupported model", ["sparsify", "gpt2!", "cats", "-o", "OUT"], "'gpt2' is not supported"),
    ("hub without network", ["sparsify", "someone/something", "cats", "-o", "OUT"], "Without network"),
    ("truncated", ["generate", "truncated!", "x"], "cannot be loaded"),
    ("corrupt", ["generate", "corrupt!", "x"], "cannot be loaded"),
    ("no weights", ["generate", "no-weights!", "x"], "cannot be loaded"),
    ("bad config", ["show", "not-json!"], "not valid JSON"),
    ("newer plan", ["generate", "newer!", "x"], "Upgrade"),
    ("newer plan shown", ["show", "newer!"], "Upgrade"),
    ("plan that does not fit", ["generate", "misfit!", "x"], "does not fit"),
    ("remote code", ["generate", "remote-code!", "x"], "--trust-remote-code"),
    ("existing output", ["sparsify", "DENSE", "cats", "-o", "SPARSE"], "--overwrite"),
    ("empty text", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "EMPTYTEXT"], "0 tokens"),
    ("short text", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "SHORT"], "measure nothing"),
    ("missing text", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "none.txt"], "no text file"),
    ("binary text", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "BINARY"], "UTF-8"),
    ("bad jsonl", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "BADJSONL"], "line 2"),
    ("hub dataset", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "some/dataset"], "nor a dataset"),
    ("few tokens", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration-tokens", 10], "too few"),
    ("no GPU", ["generate", "SPARSE", "x", "--device", "cuda"], "no CUDA GPU"),
    ("no device", ["generate", "SPARSE", "x", "--device", "abacus"], "is no device"),
    ("no dtype", ["generate", "SPARSE", "x", "--dtype", "int3"], "not known"),
    ("measured on its calibration text", ["eval", "SPARSE", "--text", "WORDS"], "calibrated on"),
    ("dense model", ["eval", "DENSE"], "is a dense model"),
    ("dense model shown", ["show", "DENSE"], "is a dense model"),
    ("long prompt", ["generate", "SPARSE", "x" * 300], "context holds 256"),
    ("empty prompt", ["generate", "SPARSE", ""], "prompt is empty"),
    ("bad top-p", ["generate", "SPARSE", "x", "--top-p", 1.5], "top_p in (0, 1]"),
    (
        "unknown task at first",
        ["sparsify", "DENSE", "cats", "-o", "OUT", "--tasks", "none.jsonl"],
        "no task file",
    ),
    ("missing text asked at first", ["sparsify", "DENSE", "cats", "-o", "OUT", "--text", "none.txt"], "no text file"),
    (
        "calibrated on what it would be measured on",
        ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "WORDS", "--text", "WORDS"],
        "calibrated on",
    ),
    ("two targets", ["sparsify", "DENSE", "cats", "-o", "OUT", "--bytes", 0.8, "--sparsity", 0.5], "are two targets"),
    ("target and sparsity", ["sparsify", "DENSE", "cats:sparsity=0.1", "-o", "OUT", "--bytes", 0.8], "leave out one"),
    (
        "no such budget",
        ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "WORDS", "--bytes", 0.1],
        "cannot be",
    ),
    ("bad quality", ["sparsify", "DENSE", "-o", "OUT", "--quality", "good"], "is not understood"),
    ("bad allocate", ["sparsify", "DENSE", "-o", "OUT", "--allocate", "serch"], "did you mean 'search'"),
    ("curve and target", ["sparsify", "DENSE", "cats", "-o", "OUT", "--bytes", 0.9, "--curve", "0.5"], "leave out one"),
    ("curve of relufy", ["sparsify", "DENSE", "relufy", "-o", "OUT", "--curve", "0.5"], "option sparsity"),
    ("curve outside", ["sparsify", "DENSE", "cats", "-o", "OUT", "--curve", "1.5"], "outside [0, 1)"),
    ("binary jsonl", ["sparsify", "DENSE", "cats", "-o", "OUT", "--calibration", "BINARYJSONL"], "UTF-8"),
    ("option twice", ["sparsify", "DENSE", "cats:sparsity=0.1,sparsity=0.2", "-o", "OUT"], "given twice"),
    ("config that is a list", ["show", "list!"], "folder is damaged"),
    ("batch of windows", ["eval", "SPARSE", "--text", "OTHER", "--tokens", 512, "--batch", "600"], "a batch of 600"),
    ("batch 0", ["bench", "SPARSE", "--batch", "0"], "whole numbers"),
    ("batch 1.5", ["bench", "SPARSE", "--batch", "1.5"], "whole numbers"),
    ("bad curve", ["sparsify", "DENSE", "cats", "-o", "OUT", "--curve", "a,b"], "give numbers"),
]


@pytest.mark.parametrize("args, said", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_mistakes(args, said, dense, sparse, words, other, broken, tmp_path, capsys):
    if said == "no CUDA GPU" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    files = {"DENSE": dense, "SPARSE": sparse, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "OTHER": other}
    files |= {name: tmp_path / f"{name}.txt" for name in ("EMPTYTEXT", "SHORT", "BINARY")}
    files |= {"BADJSONL": tmp_path / "bad.jsonl", "WORDS": words}
    (tmp_path / "empty").mkdir()
    files["BINARYJSONL"] = tmp_path / "binary.jsonl"
    files["BINARYJSONL"].write_bytes(b"\xff\xfe\x00")
    files["EMPTYTEXT"].write_text("")
    files["SHORT"].write_text("too short")
    files["BINARY"].write_bytes(b"\xff\xfe\x00")
    files["BADJSONL"].write_text('{"text": "fine"}\n{"txt": "not"}\n')
    args = [broken(arg[:-1]) if str(arg).endswith("!") else files.get(arg, arg) for arg in args]
    before = snapshot(tmp_path), snapshot(dense.parent), snapshot(sparse.parent)
    capsys.readouterr()
    assert main(*args) == 2
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.split()), captured.err
    assert captured.out == ""
    assert (snapshot(tmp_path), snapshot(dense.parent), snapshot(sparse.parent)) == before


def test_interrupted(sparse, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sandcat.checkpoints.load.load", interrupt)
    assert main("generate", sparse, "x") == 130


def test_click_errors_have_code_2(capsys):
    assert main("sparsify") == 2
    assert main("generate", "x", "--max-new-tokens", "many") == 2
    assert main("--help") == 0
