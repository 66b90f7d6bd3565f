"""Plans inside vLLM: what it writes is what our model in transformers writes, in both layouts and on two ranks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from sandcat.checkpoints.embedded import embedded_folder
from sandcat.checkpoints.load import load
from sandcat.checkpoints.save import save
from sandcat.data import Text
from sandcat.errors import CheckpointError
from sandcat.layers.sparse_module import sparse_modules
from sandcat.models.families import ARCHITECTURES
from sandcat.models.view import ModelView
from sandcat.pipeline import sparsify

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")

RECIPES = {
    "cats": ["cats:sparsity=0.5,score=output"],
    "teal": ["teal:sparsity=0.4,sites=all+head"],
    "int8": ["int8"],
    "stack": ["int8", "cats:sparsity=0.3", "teal:sparsity=0.3,sites=[q,v,o,gate]"],
}
SUBJECTS = (
    "The capital of France", "Water", "A cat", "The sun", "My favourite food", "Python", "The best way to learn",
    "Two plus two", "Bread", "The river", "Light", "A prime number", "The moon", "Music", "The largest ocean", "Rome",
)  # fmt: skip
PROMPTS = [f"{subject} is" for subject in SUBJECTS] + [f"Once upon a time, {s.lower()}" for s in SUBJECTS]


@pytest.fixture(scope="module")
def embedded():
    try:
        return embedded_folder()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def prompts(embedded) -> list[list[int]]:
    _, tokenizer = load(embedded)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def folder_of(embedded, tmp_path_factory):
    """A folder with the embedded model made sparse, by the name of its recipe."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            model, tokenizer = load(embedded, dtype="float32")
            ids = tokenizer(Path(torch.__file__).read_text()[:8000], return_tensors="pt")["input_ids"]
            text = Text(ids[:, : ids.shape[1] // 128 * 128].view(-1, 128), "source code", "0" * 64)
            sparsify(model, tokenizer, RECIPES[name], calibration=text)
            folders[name] = save(model, tokenizer, tmp_path_factory.mktemp("served") / name)
        return folders[name]

    return make


def answers(folder: Path, prompts: list[list[int]], tmp_path: Path, **options) -> list[dict]:
    """What vLLM writes on prompts."""
    asked, found = tmp_path / "prompts.json", tmp_path / "answers.json"
    asked.write_text(json.dumps(prompts))
    script = Path(__file__).with_name("vllm_answers.py")
    run = subprocess.run(
        [sys.executable, script, folder, asked, found, json.dumps(options)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(found.read_text())


@torch.inference_mode()
def ours(
    model: torch.nn.Module, prompts: list[list[int]], found: list[dict], disturbed: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """What our model gives in transformers for the tokens that vLLM wrote, each after the same tokens: the logarithm of
    their probability, and by how much the likeliest token is likelier, [2, tokens].

    Args:
        disturbed: share of noise in what each module gives.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(module, args, y):
        if isinstance(y, torch.Tensor) and y.is_floating_point():
            return y * (1 + disturbed * torch.randn(y.shape, generator=generator).to(y))

    hooks = [module.register_forward_hook(noise) for module in model.modules()] if disturbed else []
    rows = []
    for prompt, row in zip(prompts, found, strict=True):
        logits = model(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1 : -1]
        all_tokens = logits.float().log_softmax(-1)
        chosen = all_tokens.gather(-1, torch.tensor(row["ids"])[:, None])[:, 0]
        rows.append(torch.stack([chosen, all_tokens.amax(-1) - chosen]))
    for hook in hooks:
        hook.remove()
    return torch.cat(rows, 1)


ROUNDING = 2.0**-21
"""Relative noise in what each module gives, as float32's rounding leaves it: a dense model is then as far from itself
as vLLM is from it (5e-6 and 3e-6 in the mean of SmolLM2-135M's logarithms)."""


def check(folder: Path, prompts: list[list[int]], tmp_path: Path, **options) -> None:
    """vLLM writes our likeliest tokens, with our probabilities, but for rounding.

    Rounding decides where a value lies at its threshold, and such a decision grows on its way through the layers. So
    what our model makes of noise at the size of float32's rounding is what vLLM may differ by; as few tokens make most
    of the difference, it is the largest of several.
    """
    found = answers(folder, prompts, tmp_path, dtype="float32", **options)
    theirs = torch.tensor([value for row in found for value in row["logprobs"]])
    model, _ = load(folder, dtype="float32")
    exact = ours(model, prompts, found)
    noisy = [ours(model, prompts, found, ROUNDING, seed)[0] for seed in range(4)]
    allowed = 1e-4 + 1.5 * max((row - exact[0]).abs().mean() for row in noisy)
    assert (theirs - exact[0]).abs().mean() <= allowed
    assert exact[1].mean() <= allowed
    for module in sparse_modules(model).values():  # this would tell thresholds that are 1 % off
        module.threshold *= 1.01
    if sparse_modules(model):
        assert (theirs - ours(model, prompts, found)[0]).abs().mean() > allowed


LAYOUTS = pytest.mark.parametrize("sequences", [1, 64], ids=["laid out for skipping", "packed"])


@LAYOUTS
@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_transformers(folder_of, prompts, tmp_path, recipe, sequences):
    check(folder_of(recipe), prompts, tmp_path, max_num_seqs=sequences)


@LAYOUTS
def test_in_bfloat16(folder_of, prompts, tmp_path, sequences):
    """Rounding is coarser there: vLLM may be as far from float32 as our own model is."""
    folder = folder_of("cats")
    found = answers(folder, prompts, tmp_path, max_num_seqs=sequences, dtype="bfloat16")
    exact, rounded = (ours(load(folder, dtype=d)[0], prompts, found)[0] for d in ("float32", "bfloat16"))
    theirs = torch.tensor([value for row in found for value in row["logprobs"]])
    assert (theirs - exact).abs().mean() <= 1.5 * (rounded - exact).abs().mean()


@LAYOUTS
def test_compiled(folder_of, prompts, tmp_path, sequences):
    """As it runs unless told otherwise."""
    check(folder_of("cats"), prompts[:12], tmp_path, max_num_seqs=sequences, enforce_eager=False)


SERVED = [name for name, row in ARCHITECTURES.items() if row.served and name != "gemma3"]


def small(family: str, tmp_path: Path, *recipe: str, **changes) -> Path:
    """A folder with a small random model made sparse."""
    model = tiny.tiny(family, hidden_size=128, head_dim=32, intermediate_size=192, **changes)
    sparsify(model, tiny.tokenizer(), recipe, calibration=tiny.text())
    return save(model, tiny.tokenizer(), tmp_path / family)


@LAYOUTS
@pytest.mark.parametrize("family", SERVED)
def test_families(tmp_path, family, sequences):
    fused = "gate" not in ModelView(tiny.tiny(family)).linear_kinds
    head = [] if ARCHITECTURES[family].served == "layers" else ["head"]
    sites = ["qkv", "o"] if fused else ["q", "v", "o", "gate"]
    recipe = ("int8:sites=[o]", "cats:sparsity=0.4", f"teal:sparsity=0.3,sites=[{','.join(sites + head)}]")
    # vLLM's CPU kernel rounds soft-capped scores: a dense model's logarithms differ by 7e-5 there, else by 7e-9
    changes = {"attn_logit_softcapping": None} if family == "gemma2" else {}
    folder = small(family, tmp_path, *recipe, **changes)
    check(folder, tiny.text().ids_NL[:4, :20].tolist(), tmp_path, max_num_seqs=sequences)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["heads split", "one head for both"])
def test_two_ranks(tmp_path, kv_heads):
    recipe = ("int8", "cats:sparsity=0.4", "teal:sparsity=0.3,sites=[q,v,o,gate,head]")
    folder = small("llama", tmp_path, *recipe, num_key_value_heads=kv_heads)
    check(folder, tiny.text().ids_NL[:4, :20].tolist(), tmp_path, max_num_seqs=2, tensor_parallel_size=2)
