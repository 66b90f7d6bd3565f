"""What a token uses follows from the plan and from whether it belongs to the prompt: the same on every path."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from tiny import text, tiny
from transformers import ContinuousBatchingConfig, DynamicCache, StaticCache

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.errors import GenerationError, SandcatError
from sandcat.layers.modes import every_token_sparse, prompt_of
from sandcat.layers.sparse_module import sparse_modules
from sandcat.layers.weights import stored_of
from sandcat.ops.activations import ACTIVATIONS

NEW = 6
"""Tokens that are written."""
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [40], [30, 11, 30, 11, 30]]
MASKED = [
    "cats", "teal:sites=all+head", "teal:sites=[q,k,v,o,gate] cats", "rsparse:alpha=[0.7]", "int8 cats", "fp8 teal",
]  # fmt: skip
DENSE_PROMPT = [
    "cats:dense_prompt=true", "teal:sites=all+head,dense_prompt=true", "rsparse:alpha=[0.7],dense_prompt=true",
    "teal:sites=[q,k,v,o,gate] cats:dense_prompt=true", "int8 cats:dense_prompt=true",
]  # fmt: skip
CORES = ["coreinfer:sparsity=0.5", "coreinfer:sparsity=0.5 teal:sites=[o],dense_prompt=true"]


class Alone:
    """The dense model with masks of its own, on one whole sequence, in which it is told what the prompt is."""

    def __init__(self, dense, sparse):
        self.model, self.prompt = copy.deepcopy(dense), 0
        for name, module in sparse.named_modules():
            if getattr(module, "weight_scale", None) is not None:
                self.model.get_submodule(name).weight.data = stored_of(module).float()
        for name, module in sparse_modules(sparse).items():
            place = self.model.get_submodule(name)
            if hasattr(module, "threshold"):
                make = self._linear if isinstance(place, torch.nn.Linear) else self._mlp
            else:
                make = self._core
            place.forward = make(place, module)

    def _used(self, score, module):
        used = score > module.threshold
        if module.dense_prompt:
            used[:, : self.prompt] = True
        return used

    def _linear(self, linear, module):
        whole, factors = linear.forward, [f for name, f in module.named_buffers() if "factor" in name]

        def forward(x):
            used = self._used(x.abs(), module)
            y = whole(x * used)
            return y + (x * ~used) @ factors[0].t() @ factors[1].t() if factors else y

        return forward

    def _gated(self, mlp, module):
        act = ACTIVATIONS[module.activation]
        if hasattr(mlp, "gate_up_proj"):
            return lambda x: (lambda g, u: (act(g), u))(*mlp.gate_up_proj(x).chunk(2, -1))
        return lambda x: (act(mlp.gate_proj(x)), mlp.up_proj(x))

    def _mlp(self, mlp, module):
        gated = self._gated(mlp, module)

        def forward(x):
            a, u = gated(x)
            return mlp.down_proj(a * self._used(a.abs(), module) * u)

        return forward

    def _core(self, mlp, module):
        gated = self._gated(mlp, module)

        def forward(x):
            a, u = gated(x)
            h = a * u
            score = h[0, : self.prompt].clamp(min=0)
            count = round(module.votes * h.shape[-1])
            votes, total = torch.zeros(h.shape[-1]), score.sum(0)
            for row in score:
                first = row.argsort(descending=True)[:count]
                votes[first[row[first] > 0]] += 1
            votes += total / (2 * total.max())
            core = votes.argsort(descending=True, stable=True)[: module.kept_neurons]
            used = torch.ones_like(h, dtype=torch.bool)
            used[:, self.prompt :] = False
            used[:, self.prompt :, core] = True
            return mlp.down_proj(h * used)

        return forward

    def logits(self, ids, prompt):
        self.prompt = prompt
        return self.model(torch.tensor([ids])).logits[0]


def made(recipe, family="llama"):
    options = {"mlp_bias": False} if family == "llama" else {}
    dense = tiny(family, tie_word_embeddings=False, **options)
    sparse = copy.deepcopy(dense)
    sandcat.sparsify(sparse, None, recipe, calibration=text())
    sparse.generation_config.eos_token_id = None
    return sparse, Alone(dense, sparse)


def padded(prompts):
    most = max(map(len, prompts))
    ids = torch.tensor([[0] * (most - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (most - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def generated(model, prompts, **options):
    """Tokens [B, NEW] and logits [B, NEW, V]."""
    ids, mask = padded(prompts)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits[:NEW], 1)


def one_by_one(model, prompts, **options):
    found = [generated(model, [prompt], **options) for prompt in prompts]
    return torch.cat([tokens for tokens, _ in found]), torch.cat([logits for _, logits in found])


def by_decoder(model, prompts, compile):
    """Sequences of one length, by our own loop."""
    ids = torch.tensor(prompts)
    decoder = Decoder(model, ids.shape[1] + NEW, batch=len(ids), compile=compile)
    logits = [decoder.prefill(ids).clone()]
    while len(logits) < NEW:
        logits.append(decoder.step(logits[-1].argmax(-1, keepdim=True)).clone())
    assert (decoder.fused is not None) == (compile == "fused" and fuses(model))
    logits = torch.stack(logits, 1)
    return logits.argmax(-1), logits


def fuses(model):
    from sandcat.layers.core_mlp import CoreMLP

    return model.config.model_type == "llama" and CoreMLP not in map(type, sparse_modules(model).values())


def check(found, alone, prompts):
    tokens, logits = found
    for row, prompt in enumerate(prompts):
        ids = [*prompt, *tokens[row, :-1].tolist()]
        want = alone.logits(ids, len(prompt))[len(prompt) - 1 :]
        assert_close(logits[row], want, torch.float32)
        assert tokens[row].tolist() == want.argmax(-1).tolist()


WAYS = {
    "alone": lambda model: one_by_one(model, PROMPTS),
    "batch, padded": lambda model: generated(model, PROMPTS),
    "chunks of 4": lambda model: generated(model, PROMPTS, prefill_chunk_size=4),
    "chunks of 1": lambda model: generated(model, PROMPTS, prefill_chunk_size=1),
    "drafts": lambda model: one_by_one(model, PROMPTS, prompt_lookup_num_tokens=3),
    "drafts of layers of its own": lambda model: one_by_one(model, PROMPTS, assistant_early_exit=1),
    "without a cache": lambda model: generated(model, PROMPTS, use_cache=False),
    "static cache": lambda model: generated(model, PROMPTS, cache_implementation="static", disable_compile=True),
    "static cache, chunks": lambda model: generated(
        model, PROMPTS, cache_implementation="static", disable_compile=True, prefill_chunk_size=4
    ),
}
LONG = [[7 * row % 89 + 4, *PROMPTS[0]] for row in range(17)]


@pytest.mark.parametrize("recipe", MASKED + DENSE_PROMPT + CORES)
@torch.inference_mode()
def test_every_way_of_generate(recipe):
    model, alone = made(recipe)
    for way in WAYS.values():
        check(way(model), alone, PROMPTS)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("recipe", MASKED + DENSE_PROMPT + CORES)
@torch.inference_mode()
def test_every_batch(recipe, pays, request):
    """Fused and not, above and below the batch where skipping pays; and one-token prompts in a batch."""
    if pays:
        request.getfixturevalue("kernels_pay")
    model, alone = made(recipe)
    for batch in (1, 3, 17):
        for compile in (None, "fused"):
            if batch == 17 and compile == "fused":
                continue
            check(by_decoder(model, LONG[:batch], compile), alone, LONG[:batch])
    ones = [[row + 4] for row in range(5)]
    check(generated(model, ones), alone, ones)


def read(model):
    """What is seen of each forward from now on: its shape, and how many of its tokens belong to a prompt."""
    seen = []
    module = next(iter(sparse_modules(model).values()))
    module.register_forward_hook(lambda m, args, y: seen.append((*args[0].shape[:2], m.reading().first)))
    return seen


@pytest.mark.parametrize("recipe", ["cats:dense_prompt=true", "coreinfer"])
@torch.inference_mode()
def test_what_generate_reads(recipe):
    """Prompts of other kinds than ids, second ones, and those of an assistant, which is asked again and again."""
    model, _ = made(recipe)
    ids = torch.tensor([PROMPTS[0]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    seen = read(model)
    model.generate(ids, **options, num_beams=3)
    assert seen == [(3, 9, 9), (3, 1, 0), (3, 1, 0)]
    seen.clear()
    model.generate(ids, **options, guidance_scale=1.5, negative_prompt_ids=ids[:, :4])
    assert seen == [(1, 9, 9), (1, 4, 4), *[(1, 1, 0)] * 4]
    seen.clear()
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), return_dict_in_generate=True, **options)
    assert seen == [(1, 9, 9), (1, 1, 0), (1, 1, 0)]
    seen.clear()
    more = torch.cat([ids, out.sequences, torch.tensor([[33, 44]])], 1)  # the last token written is not cached yet
    model.generate(more, **options | {"attention_mask": torch.ones_like(more)}, past_key_values=out.past_key_values)
    assert seen == [(1, 3, 3), (1, 1, 0), (1, 1, 0)]
    seen.clear()
    model.generate(**options | {"attention_mask": None})
    assert seen == [(1, 1, 1), (1, 1, 0), (1, 1, 0)]
    seen.clear()
    tiny("llama").generate(ids, **options | {"max_new_tokens": 8}, assistant_model=model)
    assert seen[:2] == [(1, 9, 9), (1, 2, 1)]  # its first draft was wrong: the prompt's last token is read again
    assert len(seen) > 3 and not any(first for *_, first in seen[2:])


@pytest.mark.parametrize("recipe", ["cats:dense_prompt=true", "coreinfer:sparsity=0.5"])
@torch.inference_mode()
def test_loops_of_ones_own_say_how_long_the_prompt_is(recipe):
    model, alone = made(recipe)
    ids = torch.tensor([[*PROMPTS[0], 12, 50, 31]])
    want = alone.logits(ids[0].tolist(), 9)
    for parts in ([9, 3], [4, 4, 2, 2], [4, 4, 1, 1, 2]):
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
            with prompt_of(model, 9):
                found = [model(part, past_key_values=cache).logits for part in ids.split(parts, 1)]
            assert_close(torch.cat(found, 1)[0], want, torch.float32)
    cache = DynamicCache()
    model(ids[:, :4], past_key_values=cache)
    with pytest.raises(GenerationError, match="5 tokens a sequence go on with a cache that is filled"):
        model(ids[:, 4:9], past_key_values=cache)
    if recipe.startswith("coreinfer"):
        cache.crop(-2)
        with pytest.raises(GenerationError, match="cut back to 2 tokens, within a prompt of 4"), prompt_of(model, 9):
            model(ids[:, 2:9], past_key_values=cache)
    masked, _ = made("cats")  # to which it is all the same
    masked(ids[:, 4:], past_key_values=masked(ids[:, :4]).past_key_values)


@torch.no_grad()
def test_rows_that_hold_several_sequences():
    """transformers' flat batches, and continuous batching, whose rows are those of many requests."""
    ids = torch.tensor([[token for prompt in PROMPTS for token in prompt]])
    flat = {"input_ids": ids, "position_ids": torch.cat([torch.arange(len(prompt)) for prompt in PROMPTS])[None]}
    config = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for recipe in ("cats", "cats:dense_prompt=true", "coreinfer"):
        model, alone = made(recipe)
        dense_prompt = recipe != "cats"
        found = model(**flat, use_cache=False).logits[0].split([len(prompt) for prompt in PROMPTS])
        for prompt, logits in zip(PROMPTS, found, strict=True):
            assert_close(logits, alone.logits(prompt, len(prompt)), torch.float32)
        options = copy.deepcopy(model.generation_config)
        options.update(**config)
        if dense_prompt:
            with pytest.raises(GenerationError, match="continuous batching"):
                model.generate_batch(PROMPTS, generation_config=options)
            with pytest.raises(GenerationError, match="continuous batching"):
                model(ids, cache=object())
        else:
            small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
            batch = model.generate_batch(PROMPTS, generation_config=options, continuous_batching_config=small)
            want, _ = one_by_one(model, PROMPTS)
            assert [result.generated_tokens for result in batch.values()] == want.tolist()
    with pytest.raises(GenerationError, match="several"):
        model(**flat, past_key_values=DynamicCache())
    with pytest.raises(GenerationError, match="no core neurons were chosen"):
        model(ids[:, :1], past_key_values=model(**flat).past_key_values)
    with pytest.raises(GenerationError, match="several"), every_token_sparse(model, prompt=4):
        model(**flat, use_cache=False)


@pytest.mark.parametrize("recipe", ["teal:batch=shared", "teal:batch=shared,dense_prompt=true"])
@torch.inference_mode()
def test_sequences_share_in_decode_steps_alone(recipe):
    """Not in prompts of one token, nor in a last chunk of one."""
    model, alone = made(recipe)
    ones, nines = [[row + 4] for row in range(5)], [[row + 4, *PROMPTS[0][1:]] for row in range(3)]
    for prompts, way in ((ones, {}), (nines, {}), (nines, {"prefill_chunk_size": 4})):
        tokens, logits = generated(model, prompts, **way)
        for row, prompt in enumerate(prompts):
            assert_close(logits[row, :1], alone.logits(prompt, len(prompt))[-1:], torch.float32)
        later = alone.logits([*prompts[0], int(tokens[0, 0])], len(prompts[0]))[-1]
        assert (logits[0, 1] - later).norm() > 0.05 * later.norm()


@pytest.mark.parametrize("recipe", ["cats:dense_prompt=true", "coreinfer:sparsity=0.5"])
@torch.inference_mode()
def test_compiled_forwards(recipe):
    """Without a break: a prompt without a cache, and steps; not what a static cache cannot be asked."""
    torch.compiler.reset()
    model, alone = made(recipe)
    ids = torch.tensor([[*PROMPTS[0], 12, 50]])
    want = alone.logits(ids[0].tolist(), 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids[:, :9], use_cache=False).logits[0], want[:9], torch.float32)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
        model(ids[:, :9], past_key_values=cache)
        for at in (9, 10):
            found = compiled(ids[:, at : at + 1], past_key_values=cache).logits[0]
            assert_close(found, want[at : at + 1], torch.float32)
    with pytest.raises(Exception, match="a compiled or captured forward cannot look"):  # dynamo's own, about ours
        compiled(ids[:, 4:9], past_key_values=cache)


def test_copies_and_pickles_generate_for_themselves():
    model, alone = made("cats:dense_prompt=true")
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):  # noqa: S301
        other = copied(model)
        assert other.generate.model is other
        assert other.generate.prompts is next(iter(sparse_modules(other).values())).prompts
        assert other.generate.prompts is not model.generate.prompts
        check(one_by_one(other, PROMPTS[:1], prompt_lookup_num_tokens=3), alone, PROMPTS[:1])
        assert inspect.signature(other.generate) == inspect.signature(tiny("llama").generate)
        methods, gone = (other.generate, other.save_pretrained), weakref.ref(other)
        assert all(method.model is other for method in methods)
        del other
        assert gone() is None  # nothing waits for a collection of circles
        for method in methods:
            with pytest.raises(SandcatError, match="is gone"):
                method(None)


THREADS = """
import threading, torch, sys
sys.path.insert(0, {folder!r})
from tiny import text, tiny, tokenizer
import sandcat
from sandcat.decoding.generate import generate
torch.set_num_threads(1)
tok, ids = tokenizer(), torch.randint(4, 96, (4, 12))
tok.eos_token = None
def one():
    return ["".join(generate(model, tok, "hello world", max_new_tokens=30))]
def many():
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False).tolist()
def lookup():
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, prompt_lookup_num_tokens=3,
        do_sample=False).tolist()
def run(job, expected):
    for _ in range(8):
        wrong.extend([job.__name__] if job() != expected else [])
for recipe in {recipes}:
    model = tiny("llama", mlp_bias=False)
    sandcat.sparsify(model, None, recipe, calibration=text())
    model.generation_config.eos_token_id = None
    jobs, wrong = [one, many, lookup], []
    want = [job() for job in jobs]
    threads = [threading.Thread(target=run, args=pair) for pair in zip(jobs, want)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(recipe, wrong, flush=True)
"""


def test_threads_that_share_a_model_write_what_each_would_alone():
    """One sequence, several, and drafts at once; in a process of its own, which a wrong address would end."""
    recipes = ["cats", "teal:sites=all+head,dense_prompt=true", "coreinfer"]
    script = THREADS.format(folder=str(Path(__file__).parent.parent), recipes=recipes)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{recipe} []" for recipe in recipes]
