"""Two processes, started as users start them, find what one finds, to the last bit; the first one prints and writes."""

from __future__ import annotations

import json

import pytest
import torch
from launch import ACCELERATE, TORCHRUN, launch
from tiny import text, tiny, tokenizer

import sandcat


def differences(one, other, path: str = "") -> list[str]:
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [place for key in one for place in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        return [place for i in range(len(one)) for place in differences(one[i], other[i], f"{path}[{i}]")]
    return [] if one == other else [path]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_they_find_what_one_finds(tmp_path):
    pytest.importorskip("lm_eval")
    import several

    rows = [{"query": f"Is {i} it?", "choices": ["yes it is", "no"], "gold": i % 2} for i in range(7)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    several.main(tmp_path)
    printed = launch(TORCHRUN, several.__file__, str(tmp_path))
    assert printed.count("printed") == 1
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1"))
    for rank, found in enumerate(two):
        assert found.pop("rank") == rank
        assert differences({k: v for k, v in one.items() if k != "rank"}, found) == []


def test_the_command_line_prints_and_writes_once(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("".join(chr(32 + i * i % 90) for i in range(2600)))
    model = tiny("llama")
    sandcat.save(model, tokenizer(), tmp_path / "dense")
    options = ["--calibration", str(words), "--calibration-tokens", "1024", "--no-measure", "--device", "cpu"]
    command = ["-m", "sandcat", "sparsify", str(tmp_path / "dense"), "cats", "-o", str(tmp_path / "out"), *options]
    assert launch(TORCHRUN, *command).count("saved to") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"words.txt", "dense", "out"}
    (tmp_path / "other.txt").write_text(words.read_text()[::-1])
    options = ["--text", str(tmp_path / "other.txt"), "--tokens", "2048", "--json", "--device", "cpu"]
    command = ["-m", "sandcat", "eval", str(tmp_path / "out"), *options, "--report", str(tmp_path / "report")]
    found = json.loads(launch(ACCELERATE, *command))
    assert found["text"][0]["tokens"] > 1000 and found["text"][0]["kl"] > 0
    assert json.loads((tmp_path / "report" / "report.json").read_text())["text"] == found["text"]


def test_a_share_and_the_whole():
    from sandcat.support import processes

    assert (processes.count(), processes.rank(), processes.first()) == (1, 0, True)
    assert list(processes.mine([1, 2, 3])) == processes.in_order([1, 2, 3]) == [1, 2, 3]
    batches = text(256).ids_NL.float().split(1)
    assert torch.equal(processes.total(lambda x: x.sum(0), batches), sum(x.sum(0) for x in batches))
    assert processes.everyones(5) == [5] and processes.agreed(5) == 5
