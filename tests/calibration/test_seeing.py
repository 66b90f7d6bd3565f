"""What methods are shown of each site, and decisions for the model as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from conftest import assert_close
from tiny import text, tiny
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sandcat
from sandcat.calibration.calibrate import decide
from sandcat.calibration.seeing import FIRST_POSITIONS
from sandcat.method import NEEDS, Method, Seen, option
from sandcat.models.view import ModelView


class Windowed(nn.Module):
    """Attention of which some heads are marked."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.register_buffer("marked", torch.zeros(attention.config.num_attention_heads))

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Heads(Method):
    """Marks the heads of all layers whose queries are largest."""

    name = "heads"
    slot = "attention"
    whole_model = True

    asks: str = option("queries", "what to look at")
    count: int = option(3, "heads in all")

    @property
    def needs(self):
        return frozenset(self.asks.split("+"))

    def kinds(self, view):
        return ("attention",)

    def decide(self, site, seen):
        LOOKED.append((site.name, seen))
        return {"sizes": [float(size) for size in torch.cat(seen.queries).square().sum((0, 2, 3))]}, {}

    def settle(self, view, found):
        sizes = {(name, head): size for name, (spec, _) in found.items() for head, size in enumerate(spec["sizes"])}
        best = sorted(sizes, key=sizes.__getitem__)[-self.count :]
        heads = {name: [head for place, head in best if place == name] for name in found}
        return {
            n: ({"heads": h}, {"marked": torch.zeros(4).index_fill(0, torch.tensor(h), 1)})
            for n, h in heads.items()
            if h
        }

    def build(self, site, spec):
        return Windowed(site.module)


@dataclass(frozen=True, kw_only=True)
class Looks(Heads):
    """Looks at MLPs only."""

    name = "looks"
    slot = "input"
    whole_model = False

    def kinds(self, view):
        return ("mlp",)

    def decide(self, site, seen):
        LOOKED.append((site.name, seen))
        return {}, {}

    def build(self, site, spec):
        return nn.Sequential(site.module)


LOOKED: list[tuple[str, Seen]] = []


@pytest.fixture(autouse=True)
def nothing_seen():
    LOOKED.clear()


@torch.inference_mode()
def test_queries_and_keys_are_those_that_attention_multiplies():
    model, words = tiny("llama"), text(128)
    implementation = model.config._attn_implementation
    decide(ModelView(model), [Heads(asks="queries+keys+inputs+outputs")], words)
    assert model.config._attn_implementation == implementation
    attention, seen = model.model.layers[0].self_attn, LOOKED[0][1]
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(words.ids_NL))
    q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(64)[None]))
    assert_close(torch.cat(seen.queries), q, torch.float32)
    assert_close(torch.cat(seen.keys), k, torch.float32)
    outputs = []
    attention.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    model(words.ids_NL)
    assert_close(torch.cat(seen.outputs), outputs[0][:, FIRST_POSITIONS:].flatten(0, 1), torch.float32)
    assert_close(torch.cat(seen.inputs), x[:, FIRST_POSITIONS:].flatten(0, 1), torch.float32)
    assert seen.gradients == []


def test_gradients_are_those_of_the_whole_model():
    model, words = tiny("llama"), text(128)
    decide(ModelView(model), [Looks(asks="gradients")], words)
    assert [name for name, _ in LOOKED] == ["model.layers.1.mlp", "model.layers.0.mlp"]
    outputs = {}
    for name, _ in LOOKED:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out})
        )
    generator, found = torch.Generator().manual_seed(0), {name: [] for name, _ in LOOKED}
    for ids in words.ids_NL:
        log_p = model(ids[None]).logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), [outputs[name] for name in found])
        for name, gradient in zip(found, gradients, strict=True):
            found[name].append(gradient[0, FIRST_POSITIONS:])
    for name, seen in LOOKED:
        assert_close(torch.cat(seen.gradients), torch.cat(found[name]), torch.float32)


@pytest.mark.parametrize("asks", sorted(set(NEEDS) - {"gradients", "keys", "queries"}))
def test_only_what_is_asked_for_is_kept(asks):
    decide(ModelView(tiny("llama")), [Looks(asks=asks)], text(128))
    assert {need for _, seen in LOOKED for need in NEEDS if getattr(seen, need)} == {asks}


def test_a_decision_for_the_whole_model():
    """It sees all sites at once, may leave some as they are, and nothing of it is in place before."""
    model = tiny("llama")
    plan, tensors = decide(ModelView(model), [Heads(count=3)], text(128))
    sizes = [
        (float(s), name, head)
        for name, seen in LOOKED
        for head, s in enumerate(torch.cat(seen.queries).square().sum((0, 2, 3)))
    ]
    expected = {(name, head) for _, name, head in sorted(sizes)[-3:]}
    assert {(name, head) for name, spec in plan.steps[0].sites.items() for head in spec["heads"]} == expected
    assert not any(isinstance(module, Windowed) for module in model.modules())
    plan.place(ModelView(model), tensors)
    placed = {name: module for name, module in model.named_modules() if isinstance(module, Windowed)}
    assert {(n, int(h)) for n, m in placed.items() for h in m.marked.nonzero()} == expected
    assert set(placed) == {name for name, _ in expected}


def test_attention_and_weights_are_claimed_apart():
    recipe = [Heads(), "teal", "int8"]
    plan = sandcat.sparsify(tiny("llama"), None, recipe, calibration=text(), dry_run=True)
    assert [step.method.name for step in plan.steps] == ["heads", "teal", "int8"]
