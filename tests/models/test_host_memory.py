"""Memory: loading and running a sparse model takes no more than the dense one, 5 % allowed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from mmap import MAP_PRIVATE, mmap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import text, tiny, tokenizer

import sandcat
from sandcat.models.host_memory import LARGE, FilePages, use_large_pages
from sandcat.ops.weights import Stored, product

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def test_peak_of_loading_and_running():
    """Of whole processes. The weights (200 MB) are large enough that a tenth of them held twice fails."""
    sizes = ("hidden_size=1024", "num_hidden_layers=4", "vocab_size=4096")
    recipes = ("teal:sites=all+head", "int8 cats")
    command = [sys.executable, BENCHMARK, "--json", "--tokens", "256", "--dtype", "float32"]
    command += [word for size in sizes for word in ("--size", size)]
    command += [word for recipe in recipes for word in ("--recipe", recipe)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    dense, *sparse = json.loads(run.stdout)
    assert [row["recipe"] for row in sparse] == list(recipes)
    for row in sparse:
        for moment in ("loading", "prompt", "steps"):
            assert row[moment] <= 1.05 * dense["steps"], (row["recipe"], moment)


def resident_file_pages() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssFile:")[1].split()[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_a_file_are_given_back_and_only_those(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(2**22).float(), "b": torch.ones(2**22)}, path)
    model = torch.nn.Module()
    for name, tensor in load_file(path).items():
        model.register_buffer(name, tensor)
    model.register_buffer("own", torch.ones(2**22))
    pages = FilePages(model)
    assert set(pages.spans) == {model.a, model.b}
    total = model.a.sum() + model.b.sum()
    before = resident_file_pages()
    own, source = model.own, model.a.detach()  # another look at the same memory
    model.a.data, model.own.data = model.a.data.clone(), model.own.data.clone()
    pages.give_back()
    assert before - resident_file_pages() > 0.9 * model.a.nbytes
    assert list(pages.spans) == [model.b]
    assert torch.equal(source, model.a) and torch.equal(own, torch.ones(2**22))  # read again from the file
    assert model.a.sum() + model.b.sum() == total


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="no large pages here")
def test_large_pages_hold_what_small_ones_held():
    memory = mmap(-1, 16 * LARGE, flags=MAP_PRIVATE)  # what PyTorch hands out may lie in large pages already
    size = 3 * 2**19 + 5  # 6 MB and a little
    tensors = [torch.frombuffer(memory, dtype=torch.float32, count=size, offset=4 * LARGE * i) for i in range(4)]
    for tensor in tensors:
        tensor.uniform_()
    copies = [tensor.clone() for tensor in tensors]

    def in_large_pages() -> int:
        """Bytes in large pages, in all mappings that hold one of the tensors."""
        total, holds = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                first, end = (int(address, 16) for address in found.groups())
                holds = any(first <= tensor.data_ptr() < end for tensor in tensors)
            elif holds and line.startswith("AnonHugePages:"):
                total += 1024 * int(line.split()[1])
        return total

    use_large_pages(tensors)
    assert in_large_pages() >= 4 * 2 * LARGE
    assert all(map(torch.equal, tensors, copies))


def test_codes_are_widened_in_parts(monkeypatch):
    """Rows of 63 channels, four at a time: the outputs are those of the whole, in their order."""
    module = sys.modules[product.__module__]
    x, weight, scale = torch.randn(5, 63), torch.randint(-127, 128, (42, 63), dtype=torch.int8), torch.rand(42)
    widened = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, part: widened.append(part.shape) or linear(x, part))
    monkeypatch.setattr(module, "AT_ONCE", 4 * 63 + 1)
    torch.testing.assert_close(
        product(x, Stored(weight, scale, format="int8")), x @ (weight * scale[:, None]).t(), rtol=1e-5, atol=1e-3
    )
    assert widened == [(4, 63)] * 10 + [(2, 63)]


def test_large_models_are_saved_in_shards(monkeypatch, tmp_path):
    from sandcat.checkpoints import save as saving

    monkeypatch.setattr(saving, "SHARD", "20KB")
    model = tiny("llama")
    sandcat.sparsify(model, None, "teal:sites=all+head", calibration=text())
    folder = sandcat.save(model, tokenizer(), tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = torch.randint(4, 96, (2, 9))
    with torch.inference_mode():
        assert torch.equal(sandcat.load(folder, device="cpu")[0](ids).logits, model(ids).logits)
