"""Text from every kind of source."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny, tokenizer

from sandcat.data import load_text
from sandcat.errors import DataError


def load(source, tokens=300, **options):
    return load_text(str(source), tiny("llama"), tokenizer(), tokens=tokens, **options)


def test_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 100)
    found = load(path, tokens=500, window=128)
    assert found.ids_NL.shape == (3, 128)
    assert tokenizer().decode(found.ids_NL[0, :8]).replace(" ", "") == "abcdefgh"
    assert found.source == str(path) and len(found.sha256) == 64
    assert load(path, window=10_000).ids_NL.shape == (1, 256)  # the model's context
    assert load(path, tokens=300, window=300, seed=3).sha256 != found.sha256


def test_jsonl_and_dataset_give_the_same_text(tmp_path, monkeypatch):
    rows = "".join(json.dumps({"text": f"row {i} of the text"}) + "\n" for i in range(100))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mydata").mkdir()
    (tmp_path / "mydata" / "train.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load("rows.jsonl").ids_NL, load("mydata").ids_NL)


def test_dataset_without_text(tmp_path, monkeypatch):
    (tmp_path / "mydata").mkdir()
    (tmp_path / "mydata" / "train.jsonl").write_text('{"words": "x"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no 'text' column"):
        load("mydata")


def test_python_docs():
    assert load("python-docs", tokens=2000, window=200).tokens == 2000


@pytest.mark.parametrize("tokens, shape", [(300, (4, 75)), (5000, (64, 79)), (20_000, (64, 256))])
def test_self(tokens, shape):
    """At least as much as asked for, without a stop token, in many short sequences rather than few long ones."""
    found = load("self", tokens=tokens)
    assert found.ids_NL.shape[0] % shape[0] == 0 and found.ids_NL.shape[1] == shape[1]
    assert tokens <= found.tokens < tokens + shape[0] * shape[1]
    assert not (found.ids_NL == tokenizer().eos_token_id).any()
    assert found.ids_NL[:, 1].unique().numel() > 1
