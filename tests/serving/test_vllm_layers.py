"""What is served, without an engine: which layer does what, the split of tensors over ranks, layouts, the guard."""

from __future__ import annotations

import asyncio
import json

import pytest
import tiny
import torch
from conftest import assert_close
from torch import nn

from sandcat.errors import BadRecipe, PlanError, SandcatError, UnsupportedModel
from sandcat.layers.weights import stored_of
from sandcat.models.families import ARCHITECTURES
from sandcat.models.view import ModelView
from sandcat.ops.masks import drop_up, gate_bounds
from sandcat.ops.weights import Stored
from sandcat.pipeline import sparsify
from sandcat.plans.recipe import parse_recipe
from sandcat.serving.engine_plan import Part, groups, own_part, sites_of
from sandcat.serving.engines import Service, choose, vllm_command
from sandcat.serving.request_guard import Guard, Limits
from sandcat.serving.vllm.layers import Masked, Skipping, SkippingUp

LLAMA = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PHI = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}


def made(family: str, recipe: str, **changes) -> tuple[nn.Module, object]:
    model = tiny.tiny(family, **changes)
    return model, sparsify(model, tiny.tokenizer(), parse_recipe(recipe), calibration=tiny.text())


def test_parts_of_fused_layers():
    model, plan = made("llama", "int8:sites=[q,o] cats teal:sites=[q,k,o,head]")
    sites, layer = sites_of(plan, model.config), "model.layers.1"
    assert sites.parts(f"{layer}.self_attn.qkv_proj", LLAMA) == [Part(True, "int8"), Part(True), Part()]
    assert sites.parts(f"{layer}.self_attn.o_proj", LLAMA) == [Part(True, "int8")]
    assert sites.parts(f"{layer}.mlp.gate_up_proj", LLAMA) == [Part(), Part()]
    assert sites.neurons(f"{layer}.mlp.gate_up_proj", LLAMA) == "gate_up"
    assert sites.neurons(f"{layer}.mlp.down_proj", LLAMA) == "down"
    assert sites.neurons(f"{layer}.self_attn.o_proj", LLAMA) is None
    assert sites.parts("lm_head", LLAMA) == [Part(True)] and sites.head_skips
    other = sites.renamed(lambda name: name.replace("model.", "language_model.model."))
    assert other.parts("language_model.model.layers.0.self_attn.o_proj", LLAMA) == [Part(True, "int8")]


def test_parts_of_layers_that_the_checkpoint_fuses():
    model, plan = made("phi3", "cats teal:sites=[qkv]")
    sites = sites_of(plan, model.config)
    assert sites.parts("model.layers.0.self_attn.qkv_proj", PHI) == [Part(True)]
    assert sites.neurons("model.layers.0.mlp.gate_up_proj", PHI) == "gate_up"


@pytest.mark.parametrize(
    "family, recipe, error, words",
    [
        ("llama", "coreinfer", PlanError, "coreinfer cannot run inside vLLM"),
        ("llama", "rsparse", PlanError, "rsparse cannot run inside vLLM"),
        ("llama", "cats:dense_prompt=true", PlanError, "dense_prompt"),
        ("llama", "teal:batch=shared", PlanError, "batch=own"),
        ("gemma2", "teal:sites=[head]", PlanError, "no head of its own"),
        ("olmo2", "cats", UnsupportedModel, "do not run sparse in vLLM"),
    ],
)
def test_what_cannot_be_served_says_what_can(family, recipe, error, words):
    model, plan = made(family, recipe)
    with pytest.raises(error, match=words) as caught:
        sites_of(plan, model.config)
    assert "--engine transformers" in str(caught.value)


def test_every_family_says_what_it_can():
    assert {row.served for row in ARCHITECTURES.values()} <= {"all", "layers", ""}


def test_parts_that_are_computed_alike_are_one():
    t, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    a = Part(channels=True)
    assert groups([a, a, a], [4, 2, 2], [t, t.clone(), other]) == [(0, slice(0, 6)), (2, slice(6, 8))]
    assert groups([Part(), a, Part()], [4, 2, 2], [None, t, None]) == [
        (0, slice(0, 4)), (1, slice(4, 6)), (2, slice(6, 8)),
    ]  # fmt: skip
    assert groups([a, Part(True, "int8")], [1, 1], [t, t]) == [(0, slice(0, 1)), (1, slice(1, 2))]


def test_a_share_is_a_ranks_part_or_all():
    x = torch.arange(6)
    assert [own_part(x, 2, rank).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert own_part(x, 6, 2) is x


def packed(weight, threshold):
    return Masked(weight, threshold, dtype=torch.float32, pack=lambda m: lambda x: x @ m.weight.t())


def part(stored, size, rank, dim=0):
    """A rank's share of the outputs of a matrix, or of its inputs."""
    codes = stored.codes.view(torch.int8) if stored.scale is not None else stored.codes
    codes = codes.narrow(dim, rank * size, size).contiguous().view(stored.codes.dtype)
    scale = stored.scale if stored.scale is None or dim else stored.scale.narrow(0, rank * size, size)
    return stored._replace(codes=codes, scale=scale, bias=None)


LAYOUTS = pytest.mark.parametrize("layout", [Skipping, packed])
TOKENS = pytest.mark.parametrize("tokens", [1, 2, 33])


@pytest.mark.usefixtures("kernels_pay")
@LAYOUTS
@TOKENS
@pytest.mark.parametrize("recipe", ["teal", "int8 teal", "int8", "fp8 teal", "fp8"])
def test_a_linear_layer_over_two_ranks(layout, tokens, recipe):
    """Split by inputs (o, down) the ranks' results add up to our own layer's; by outputs they are its parts."""
    model, _ = made("llama", recipe)
    module = ModelView(model).layers[0].self_attn.o_proj
    x, size = torch.randn(1, tokens, module.in_features), module.in_features // 2
    threshold = getattr(module, "threshold", None)
    stored, total = stored_of(module), 0
    for rank in range(2):
        own = None if threshold is None else own_part(threshold, size, rank)
        layer = layout(part(stored, size, rank, 1), own)
        total = total + layer(own_part(x[0].t(), size, rank).t())
    assert_close(total, module(x)[0], torch.float32)
    parts = [layout(part(stored, size, rank), threshold)(x[0]) for rank in range(2)]
    assert_close(torch.cat(parts, -1), module(x)[0], torch.float32)


@pytest.mark.usefixtures("kernels_pay")
@LAYOUTS
@TOKENS
@pytest.mark.parametrize("recipe", ["cats", "int8 cats", "fp8 cats"])
def test_neurons_over_two_ranks(layout, tokens, recipe):
    """Each rank has some neurons with their thresholds; what the ranks' down projections give adds up."""
    model, _ = made("llama", recipe, mlp_bias=False)
    mlp = ModelView(model).layers[0].mlp
    x, size, total = torch.randn(1, tokens, 32), len(mlp.threshold) // 2, 0
    zeros = torch.zeros(size)
    for rank in range(2):
        threshold = own_part(mlp.threshold, size, rank)
        gate, up = (part(half, size, rank) for half in (mlp.gate(), mlp.up()))
        g = layout(gate, None)(x[0])
        if layout is Skipping:
            u = SkippingUp(up, threshold, "silu")(x[0], g)
        else:
            both = torch.cat([g, layout(up, None)(x[0])], -1)
            drop_up(both, gate_bounds(threshold, "silu"))
            u = both.chunk(2, -1)[1]
        h = torch.nn.functional.silu(g) * u  # what the engine does between its layers
        kept = ~(torch.nn.functional.silu(g).abs() <= threshold)
        assert bool((h[~kept] == 0).all()) and 0 < kept.sum() < kept.numel()
        down = part(stored_of(mlp.down), size, rank, 1)
        total = total + layout(down, zeros if layout is Skipping else None)(h)
    assert_close(total, mlp(x)[0], torch.float32)


def test_a_skipping_layer_goes_through_the_compiler():
    layer = Skipping(Stored(torch.randn(24, 16)), torch.full((16,), 0.5))
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 16)
        assert_close(run(x), layer(x), torch.float32)


def test_the_command_of_vllm(monkeypatch, tmp_path):
    command = vllm_command(Service("OUT", "cats", context=512, key="secret", more=["--max-num-seqs", "1"]))
    assert "secret" not in " ".join(command) and command[-2:] == ["--max-num-seqs", "1"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--max-model-len") + 1] == "512"


def test_the_choice_of_an_engine(monkeypatch):
    have: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in have else None)
    with pytest.raises(SandcatError, match="nothing to serve with"):
        choose("auto", "OUT", None)
    with pytest.raises(BadRecipe, match="Known: auto"):
        choose("ollama", "OUT", None)
    have |= {"fastapi", "uvicorn", "openai"}
    assert choose("auto", "OUT", None)[0] == "transformers"
    with pytest.raises(SandcatError, match="pip install vllm"):
        choose("vllm", "OUT", None)
    have.add("vllm")
    assert choose("auto", "OUT", None)[0] == "vllm"


async def echo(scope, receive, send):
    """An application that answers with what it got."""
    body = (await receive())["body"] if scope["path"] != "/health" else b"{}"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(path: str, body=None, *, method: str = "POST", key: str = "k") -> tuple[int, dict]:
    guard = Guard(echo, name="cats", target="/t", count=len, limits=Limits(16, 8), key="k")
    sent = []

    async def receive():
        return {"type": "http.request", "body": body if isinstance(body, bytes) else json.dumps(body).encode()}

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_the_guard_lets_good_requests_through():
    status, seen = ask("/v1/completions", {"model": "cats", "prompt": "abc", "max_tokens": 5, "logprobs": None})
    assert status == 200 and seen == {"model": "/t", "prompt": "abc", "max_tokens": 5}
    message = [{"role": "user", "content": "hi"}]
    assert ask("/v1/chat/completions", {"messages": message, "max_completion_tokens": 3})[1]["max_tokens"] == 3
    assert ask("/v1/completions", {"prompt": "abc"})[1]["max_tokens"] == 8
    assert ask("/v1/models", method="GET")[1]["data"][0]["id"] == "cats"
    assert ask("/health", method="GET", key="")[0] == 200


@pytest.mark.parametrize(
    "status, path, body",
    [
        (404, "/reset", {}),
        (404, "/load_model", {"model": "x"}),
        (400, "/v1/completions", b"{"),
        (400, "/v1/completions", []),
        (400, "/v1/completions", {"prompt": ""}),
        (400, "/v1/completions", {"prompt": ["a", "b"]}),
        (404, "/v1/completions", {"prompt": "a", "model": "gpt"}),
        (400, "/v1/completions", {"prompt": "a" * 16}),
        (400, "/v1/completions", {"prompt": "a", "max_tokens": 16}),
        (400, "/v1/completions", {"prompt": "a", "max_tokens": 0}),
        (400, "/v1/completions", {"prompt": "a", "max_tokens": "many"}),
        (400, "/v1/completions", {"prompt": "a", "temperature": 3}),
        (400, "/v1/completions", {"prompt": "a", "seed": 1.5}),
        (400, "/v1/completions", {"prompt": "a", "n": 2}),
        (400, "/v1/completions", {"prompt": "a", "logprobs": 3}),
        (400, "/v1/completions", {"prompt": "a", "stop": [1]}),
        (400, "/v1/chat/completions", {"prompt": "a"}),
        (400, "/v1/chat/completions", {"messages": []}),
        (400, "/v1/chat/completions", {"messages": [{"role": "user"}]}),
    ],
)
def test_the_guard_refuses(status, path, body):
    found, answer = ask(path, body)
    assert found == status
    assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_the_guard_wants_the_key():
    status, answer = ask("/v1/completions", {"prompt": "a"}, key="other")
    assert status == 401 and answer["error"]["type"] == "authentication_error"
