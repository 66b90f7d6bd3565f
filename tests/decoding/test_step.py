"""The fused decode step. What it computes on a GPU is checked without one by ops/test_triton_interpreted.py."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICES, TOLERANCE, assert_close
from layer_classes import RECIPES, concrete, in_a_subclass, with_class
from tiny import VOCABULARY, text, tiny
from torch import nn
from transformers import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring import edges, step_parity
from sandcat.ops import FORMATS, pays
from sandcat.ops.numba.primitives import processor

SIZES = {"hidden_size": 320, "intermediate_size": 711, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def short_rows_skip(monkeypatch) -> None:
    """Whatever pays on this processor."""
    monkeypatch.setattr(processor, "SHORT_ROW", 0)


@torch.inference_mode()
def pair(model, batch=1, length=70, steps=4):
    """Logits of a few steps as transformers runs them, and as the fused step does; and the fused step."""
    ids = torch.randint(4, VOCABULARY, (batch, length + steps))
    found = []
    for mode in (None, "fused"):
        decoder = Decoder(model, length + steps, batch=batch, compile=mode)
        decoder.prefill(ids[:, :length])
        found.append([decoder.step(ids[:, length + i :][:, :1].to(model.device)).clone() for i in range(steps)])
    return *found, decoder.fused


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [(4, 4, 16), (10, 2, 40), (8, 1, 64)], ids=str)
@pytest.mark.parametrize(
    "recipe", [None, "cats", "cats:layers=1:", "teal", "teal:sites=[k,o,up]", "teal:sites=[q,k,v,o,gate] cats"]
)
def test_equals_transformers(device, family, heads, recipe):
    query, groups, size = heads
    options = {"mlp_bias": False} if family == "llama" else {}
    heads = {"num_attention_heads": query, "num_key_value_heads": groups, "head_dim": size}
    model = tiny(family, **SIZES, **options, **heads).to(device)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b.cpu(), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        "int8", "int8 teal", "int8 cats", "int8 teal:sites=[q,k,v,o,gate] cats", "int8:sites=[up,v,head] cats",
        "int8:sites=[k,gate,o] teal:sites=[q,down,head]", "int8 teal:sites=all+head", "teal:sites=all+head",
        "fp8", "fp8:sites=[q,k,gate] int8:sites=[o,up,head] cats", "fp8 teal:sites=all+head",
        "rsparse:alpha=[0.6]", "int8 rsparse:alpha=[0.5],sparsity=0.1", "rsparse:alpha=[0.6],sites=[v,o,up] int8",
    ],
)  # fmt: skip
def test_codes_at_some_sites_and_a_head_that_skips(device, tied, recipe):
    model = tiny("llama", mlp_bias=False, **{**SIZES, "tie_word_embeddings": tied}).to(device)
    sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b.cpu(), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["cats", "int8 teal:sites=[q,k,v,o,gate] cats"])
def test_two_runs_give_the_same_bits(monkeypatch, recipe):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = tiny("llama", torch.bfloat16, mlp_bias=False, hidden_size=1024, intermediate_size=4097).cuda()
    sandcat.sparsify(model, None, recipe, calibration=text())
    torch.use_deterministic_algorithms(True)
    try:
        torch.manual_seed(0)
        first = pair(model, steps=20)[1]
        torch.manual_seed(0)
        assert torch.equal(torch.stack(pair(model, steps=20)[1]), torch.stack(first))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recipe", [None, "teal:sparsity=0.2"])
def test_half_precision(device, dtype, recipe):
    """As near to the float32 model with the same weights as transformers is: it rounds at other places."""
    model = tiny("llama", dtype, mlp_bias=False, **SIZES).to(device)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    torch.manual_seed(1)
    want, found, fused = pair(model)
    assert fused is not None
    torch.manual_seed(1)
    exact = pair(model.float())[0]
    for a, b, c in zip(found, want, exact, strict=True):
        assert (a - c).norm() <= 1.5 * (b - c).norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "family, batch",
    [("gemma2", 1), ("gemma2", 2), ("llama", 17)],
)
def test_where_it_does_not_apply(device, family, batch):
    want, found, fused = pair(tiny(family).to(device), batch=batch)
    assert fused is None
    assert torch.equal(torch.stack(found), torch.stack(want))


REFUSED = ("CoreMLP",)
"""Classes of layers that no fused step computes, as they need the model's forward."""


def test_every_class_of_layer_has_a_recipe():
    assert set(RECIPES) == {kind.__name__ for kind in concrete()} | {"Linear"}


@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name, recipe", [(name, recipe) for name in RECIPES for recipe in RECIPES[name]])
def test_every_class_of_layer(name, recipe, batch):
    """It is computed, or refused, and so is a subclass, which computes something else. The same on a GPU:
    ops/interpret_step.py."""
    model = with_class(name, recipe)
    for changed in (False, True):
        if changed:
            in_a_subclass(next(module for module in model.modules() if type(module).__name__ == name))
        want, found, fused = pair(model, batch, length=20, steps=2)
        assert (fused is None) == (name in REFUSED)
        for a, b in zip(found, want, strict=True):
            assert_close(a, b, torch.float32)


def refused(model, batch=1):
    """Whether the fused step does not apply, and the model's own runs."""
    want, found, fused = pair(model, batch, length=20, steps=2)
    return fused is None and torch.equal(torch.stack(found), torch.stack(want))


@pytest.mark.parametrize("name", [
    "", "model", "model.rotary_emb", "model.norm", "model.layers.1", "model.layers.1.input_layernorm",
    "model.layers.1.post_attention_layernorm", "model.layers.1.self_attn", "model.layers.1.self_attn.q_norm",
    "model.embed_tokens",
])  # fmt: skip
def test_not_where_a_module_is_a_subclass(name):
    model = tiny("qwen3", **SIZES)
    assert not refused(model)
    in_a_subclass(model.get_submodule(name))
    assert refused(model)


class Toy(nn.Module):
    """An MLP that nobody knows, in a dtype of its own."""

    def __init__(self, size):
        super().__init__()
        self.inner = nn.Linear(size, size, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.inner(x.double())).to(x.dtype)


def runs(fused):
    """How many records each run of a program has, and what is called after it."""
    return [(run.records, run.call and type(run.call.module).__name__) for run in fused.runs]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_toy_interrupts_the_program_and_the_rest_stays_fused(batch):
    model = tiny("qwen3", num_hidden_layers=3, **SIZES)
    _, _, fused = pair(model, batch, length=20, steps=1)
    # embed; norm, project, attend, o, norm, neurons, down; norm, head, end
    assert runs(fused) == [(1 + 3 * 7 + 3, None)]
    model.model.layers[1].mlp = Toy(SIZES["hidden_size"])
    want, found, fused = pair(model, batch, length=20, steps=3)
    assert runs(fused) == [(1 + 7 + 6, "Toy"), (1 + 7 + 3, None)]  # where it is given x; where it is taken
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, torch.float32)


@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "recipe", [None, "teal:dense_prompt=true", "rsparse:alpha=[0.5],dense_prompt=true", "int8 cats"]
)
@pytest.mark.parametrize("names", [["self_attn.k_proj"], ["self_attn.o_proj", "mlp.up_proj"], ["mlp"], ["mlp.act_fn"]])
def test_what_is_called_is_as_decoded(names, recipe, batch):
    """Whatever its class has changed, wherever it stands, and the head too."""
    model = tiny("qwen3", **SIZES)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    for name in names:
        if name == "mlp.act_fn" and recipe == "int8 cats":
            continue  # an MLP that skips neurons has none
        in_a_subclass(model.get_submodule(f"model.layers.1.{name}"))
    if "o_proj" in names[0]:
        in_a_subclass(model.lm_head)
    want, found, fused = pair(model, batch, length=20, steps=2)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, torch.float32)


def test_not_where_attention_is_somebody_elses():
    def attention(*args, **kwargs):
        found, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
        return found * 2, weights

    ALL_ATTENTION_FUNCTIONS.register("doubled", attention)
    AttentionMaskInterface.register("doubled", AttentionMaskInterface()["sdpa"])
    model = tiny("qwen3", **SIZES)
    model.set_attn_implementation("doubled")
    assert refused(model)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("recipe", [None, "cats", "teal", "int8", "int8 teal", "int8 cats", "int8:sites=[q,up,head]",
                                    "rsparse:alpha=[0.5]"])  # fmt: skip
def test_threads_and_biases_on_a_cpu(threads, recipe):
    model = tiny("llama", mlp_bias=True, attention_bias=True, **SIZES)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want, found, fused = pair(model, length=300)  # past what attention looks at in one go
    finally:
        torch.set_num_threads(before)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, torch.float32)


SEVERAL = [
    None, "cats", "teal", "int8", "int8 teal:sites=all+head", "teal:sites=[q,k,v,o,gate] cats", "int8 cats",
    "teal:batch=shared", "int8 cats:batch=shared", "teal:sites=[k,o,gate],batch=shared cats:batch=shared",
    "rsparse:alpha=[0.5]",
]  # fmt: skip


def several(recipe, dtype=torch.float32, device="cpu"):
    model = tiny("llama", mlp_bias=True, attention_bias=True, num_attention_heads=10, head_dim=40, **SIZES).to(device)
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    return model.to(dtype)


@torch.inference_mode()
def off_the_edge(model, ids):
    """Thresholds with which those units are kept that a rounding may take across at the last token: where two right
    steps decide otherwise, they differ by all of it."""
    modules, decoder = edges.thresholded(model), Decoder(model, ids.shape[1], batch=len(ids), compile=None)
    decoder.prefill(ids[:, :-1])
    with edges.thresholds_restored(modules), edges.off_the_edge(model):
        decoder.step(ids[:, -1:])
        return [module.threshold for module in modules]


@contextmanager
def thresholds_set(model, thresholds):
    """In place, where a step reads them, and after the prompt, which skips by them too."""
    own = [module.threshold for module in edges.thresholded(model)]
    before = [threshold.clone() for threshold in own]
    for threshold, value in zip(own, thresholds, strict=True):
        threshold.copy_(value)
    yield
    for threshold, value in zip(own, before, strict=True):
        threshold.copy_(value)


CASES = list(itertools.product(pays._ALL, ["cpu", "cuda"], pays._FLOATS, FORMATS))


@pytest.fixture
def all_skip(monkeypatch):
    """Whatever pays."""
    monkeypatch.setattr(pays, "_MOST_TOKENS", dict.fromkeys(CASES, (16, 16)))


@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("recipe", SEVERAL)
@pytest.mark.parametrize("device", DEVICES)
def test_several_sequences(monkeypatch, recipe, device):
    """Layer by layer: where a rounding decides whether a unit is kept, two right steps differ by all of it. Units that
    are nearer to that than what a layer's products are off by are kept in both."""
    monkeypatch.setattr(edges, "ROUNDINGS", 32)
    monkeypatch.setitem(step_parity.LAYER_TOLERANCE, torch.float32, TOLERANCE[torch.float32])
    model = several(recipe, device=device)
    for batch in (2, 3, 4, 7, 16):
        torch.manual_seed(batch)
        ids = torch.randint(4, VOCABULARY, (batch, 21)).to(device)
        step_parity.check_layers(str(recipe), model, ids[:, :-1], ids[:, -1:])


@pytest.mark.gpu
@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("recipe", [None, "int8 teal:batch=shared"])
def test_several_sequences_of_other_families_on_a_gpu(family, recipe):
    model = tiny(family, **SIZES).cuda()
    if recipe:
        sandcat.sparsify(model, None, recipe, calibration=text())
    want, found, fused = pair(model, batch=5)
    assert fused is not None
    for a, b in zip(found, want, strict=True):
        assert_close(a, b.cpu(), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("recipe", [None, "teal:sparsity=0.2", "teal:sparsity=0.2,batch=shared", "int8"])
def test_several_sequences_in_half_precision_on_a_gpu(recipe):
    """As near to the float32 model as transformers is."""
    model = several(recipe, torch.bfloat16, "cuda")
    torch.manual_seed(1)
    want, found, fused = pair(model, batch=4)
    assert fused is not None
    torch.manual_seed(1)
    exact = pair(model.float(), batch=4)[0]
    ours, theirs = (sum((a - b).norm() for a, b in zip(logits, exact, strict=True)) for logits in (found, want))
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("recipe", ["teal:sites=all+head", "cats", "teal:sites=[q,k,v,o,gate] cats"])
def test_no_step_stores_a_weight_anew(recipe):
    """Whatever its batch, fused or not: another thread may be reading it."""
    model = several(recipe)
    places = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    assert all(module.packed for module in sparse_modules(model).values())
    for batch in (3, 1, 17):
        torch.manual_seed(batch)
        want, found, fused = pair(model, batch=batch, length=20, steps=2)
        assert (fused is None) == (batch == 17)
        for a, b in zip(found, want, strict=True):
            assert_close(a, b, torch.float32)
    assert places == {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}


def test_weights_lie_for_where_they_are_moved_to(monkeypatch):
    """Rows of 1,280 bytes in float32 are skipped here, of 640 in bfloat16 not."""
    monkeypatch.setattr(processor, "SHORT_ROW", 1000)
    model = several("cats")
    for dtype, by_inputs in ((torch.float32, True), (torch.bfloat16, False), (torch.float32, True)):
        assert {module.packed for module in sparse_modules(model.to(dtype)).values()} == {by_inputs}


MASKS = [
    "cats", "teal:sites=all+head", "teal:sites=[q,k,v,o,gate] cats", "teal:sites=[k,down]", "int8 cats",
    "teal:sites=[k,o,gate],batch=shared cats:batch=shared", "teal:sites=[q,o,down],batch=shared",
    "int8 teal:batch=shared", "int8 cats:batch=shared",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", MASKS)
def test_what_is_read_and_counts_as_zero_is_as_if_it_were_skipped(monkeypatch, recipe, dtype):
    """Where rows are too short to skip, which are stored as a dense model's, and above the batch where it pays."""
    length = 20 if dtype == torch.float32 else 23  # in bfloat16 one step: roundings of a step stay in its cache
    ids, found, thresholds = torch.randint(4, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0)), {}, {}
    for short, most in ((0, 16), (2**20, 16), (0, 0), (2**20, 0)):
        monkeypatch.setattr(processor, "SHORT_ROW", short)
        monkeypatch.setattr(pays, "_MOST_TOKENS", dict.fromkeys(CASES, (most, most)))
        torch.manual_seed(0)
        model = several(recipe, dtype)
        assert {module.packed for module in sparse_modules(model).values()} == {short == 0}
        for batch in (1, 5):
            decoder = Decoder(model, 24, batch=batch)
            decoder.prefill(ids[:batch, :length])
            if batch not in thresholds:
                thresholds[batch] = off_the_edge(model, ids[:batch])
            with thresholds_set(model, thresholds[batch]):
                steps = [decoder.step(ids[:batch, i : i + 1]).clone() for i in range(length, 24)]
            assert decoder.fused is not None
            found.setdefault(batch, []).append(torch.cat(steps))
    for want, *others in found.values():
        for other in others:
            assert_close(other, want, dtype)


@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("recipe", [r for r in SEVERAL if not r or "shared" not in r])
@torch.inference_mode()
def test_each_of_several_sequences_is_as_alone(recipe):
    """In bfloat16, where another order of sums rounds to other numbers; shared lists are compared in float32."""
    model = several(recipe, torch.bfloat16)
    ids = torch.randint(4, VOCABULARY, (5, 32))
    together, alone = Decoder(model, 32, batch=5), Decoder(model, 32)
    alone.prefill(ids[:1, :31])
    alone.step(ids[:1, 31:])
    together.prefill(ids[:, :31])
    with thresholds_set(model, off_the_edge(model, ids)):
        found = together.step(ids[:, 31:]).clone()
        assert alone.fused is not None and together.fused is not None
        for b in range(5):
            alone.cache.begin([0])
            for mine, other in zip(alone.cache.layers, together.cache.layers, strict=True):
                mine.update(*(both[b : b + 1] for both in other.gathered([31] * 5)))
            alone.rewind(31)
            assert_close(found[b], alone.step(ids[b : b + 1, 31:])[0], torch.bfloat16)


@pytest.mark.usefixtures("all_skip")
@pytest.mark.parametrize("recipe", [None, "cats", "teal:batch=shared"])
@torch.inference_mode()
def test_three_sequences_are_written_as_transformers_writes_them(recipe):
    model = several(recipe)
    ids = torch.randint(4, VOCABULARY, (3, 9))
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    decoder = Decoder(model, 21, batch=3)
    tokens = [decoder.prefill(ids).argmax(-1, keepdim=True)]
    while len(tokens) < 12:
        tokens.append(decoder.step(tokens[-1]).argmax(-1, keepdim=True))
    assert decoder.fused is not None
    assert torch.equal(torch.cat(tokens, 1), want[:, 9:])


@torch.inference_mode()
def test_a_token_outside_the_vocabulary():
    decoder = Decoder(tiny("llama"), 8)
    decoder.prefill(torch.tensor([[5, 6]]))
    with pytest.raises(IndexError, match=f"{VOCABULARY}"):
        decoder.step(torch.tensor([[VOCABULARY]]))
    decoder = Decoder(decoder.model, 8, batch=2)
    decoder.prefill(torch.tensor([[5, 6], [7, 8]]))
    with pytest.raises(IndexError, match=f"{VOCABULARY}"):
        decoder.step(torch.tensor([[3], [-1]]))


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_rewinds(device):
    model = tiny("llama", mlp_bias=False, **SIZES).to(device)
    ids = torch.randint(4, VOCABULARY, (1, 20)).to(device)
    decoder = Decoder(model, 20)
    decoder.prefill(ids[:, :10])
    want = [decoder.step(ids[:, i : i + 1]).clone() for i in range(10, 20)]
    for start in (10, 15):
        decoder.rewind(start)
        for i in range(start, 20):
            assert_close(decoder.step(ids[:, i : i + 1]), want[i - 10].cpu(), torch.float32)
    decoder.prefill(ids[:, :10])
    assert_close(decoder.step(ids[:, 10:11]), want[0].cpu(), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_the_cache_owns_the_position(device):
    """Whoever adds a token moves it on, so that fused and eager steps take turns on one cache."""
    model = tiny("llama", mlp_bias=False, **SIZES).to(device)
    ids = torch.randint(4, VOCABULARY, (2, 20)).to(device)
    eager, turns = Decoder(model, 20, batch=2, compile=None), Decoder(model, 20, batch=2)
    for decoder in (eager, turns):
        decoder.prefill(ids[:, :10])
    for i in range(10, 20):
        want = eager.step(ids[:, i : i + 1])
        fused = i % 3 != 1
        found = turns.step(ids[:, i : i + 1]) if fused else turns._forward(ids[:, i : i + 1])
        assert_close(found, want.cpu(), torch.float32)
        assert turns.cache.get_seq_length() == i + 1
    assert turns.fused is not None
    turns.rewind(12)
    assert_close(turns.step(ids[:, 12:13]), eager_step(model, ids, 12), torch.float32)


def eager_step(model, ids, at):
    decoder = Decoder(model, 20, batch=len(ids), compile=None)
    decoder.prefill(ids[:, :at])
    return decoder.step(ids[:, at : at + 1]).cpu()
