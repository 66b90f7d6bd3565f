"""coreinfer: which neurons a prompt chooses, and whose they are: a generation's own, however generations take turns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from tiny import FAMILIES, VOCABULARY, text, tiny, tokenizer
from transformers import DynamicCache, StaticCache

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.errors import BadRecipe, DataError, GenerationError, PlanConflict
from sandcat.layers import core_mlp as core_layer
from sandcat.layers.modes import every_token_sparse, prompt_of
from sandcat.layers.sparse_module import sparse_modules
from sandcat.measuring.quality import evaluate_text
from sandcat.methods import Cats, Coreinfer
from sandcat.methods.coreinfer import centres_of
from sandcat.models.view import ModelView


def sparsified(family="llama", recipe="coreinfer:sparsity=0.5", dtype=torch.float32):
    dense = tiny(family, dtype)
    sparse = copy.deepcopy(dense)
    sandcat.sparsify(sparse, None, recipe, calibration=text())
    return dense, sparse


def prompts(*shape, seed=1):
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def decoded(model, ids, split, cache=None):
    """The logits after `split` tokens of a prompt, one token at a time."""
    cache = DynamicCache() if cache is None else cache
    model(ids[:, :split], past_key_values=cache)
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(split, ids.shape[1])], 1)


@pytest.mark.parametrize("score", ["signed", "absolute"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_prompt_chooses_what_its_tokens_vote_for(family, score, monkeypatch):
    """Counted here token by token; padding has no vote, and each sequence its own."""
    monkeypatch.setattr(core_layer, "PROMPT_CHUNK", 5)
    dense, sparse = sparsified(family, f"coreinfer:sparsity=0.5,votes=0.25,score={score}")
    ids, mask = prompts(3, 16), torch.ones(3, 16, dtype=torch.long)
    mask[0, :9], mask[1, :2] = 0, 0
    seen = {}
    for site in ModelView(dense).mlps():
        down = site.module.down_proj
        down.register_forward_pre_hook(lambda m, args, layer=site.layer: seen.__setitem__(layer, args[0]))
    for model in (dense, sparse):
        cache = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).past_key_values
    cores = cache.sandcat_prompt.cores
    for layer in range(len(cores)):
        score_BTI = seen[layer] if score == "signed" else seen[layer].abs()
        for row in range(3):
            votes = torch.zeros(72)
            for token in range(16):
                if mask[row, token]:
                    votes[score_BTI[row, token].argsort(descending=True)[:18]] += 1
            core = cores[layer][row]
            assert core.sum() == 36
            assert votes[core].min() >= votes[~core].max()
    assert not torch.equal(core, cores[layer][0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_window_is_what_decoding_gives(family):
    for recipe in ("coreinfer:sparsity=0.5", "coreinfer:sparsity=0.5,rule=similarity,clusters=3"):
        dense, sparse = sparsified(family, recipe)
        ids = prompts(2, 24)
        with every_token_sparse(sparse, prompt=9):
            window = sparse(ids).logits
        want = decoded(sparse, ids, 9)
        assert_close(window[:, 9:], want, torch.float32)
        assert_close(window[:, :9], dense(ids[:, :9]).logits, torch.float32)
        assert_close(sparse(ids).logits, dense(ids).logits, torch.float32)
        assert (want - dense(ids).logits[:, 9:]).norm() > 0.05 * want.norm()
        whole = decoded(sparsified(family, "coreinfer:sparsity=0")[1], ids, 9)
        assert_close(whole, dense(ids).logits[:, 9:], torch.float32)


@torch.inference_mode()
def test_generations_that_take_turns_do_not_mix():
    _, sparse = sparsified()
    one, other = prompts(1, 14, seed=2), prompts(2, 14, seed=3)
    want = [decoded(sparse, ids, 8) for ids in (one, other)]
    caches, found = [DynamicCache(), StaticCache(config=sparse.config, max_cache_len=32)], [[], []]
    for ids, cache in zip((one, other), caches, strict=True):
        sparse(ids[:, :8], past_key_values=cache)
    for i in range(8, 14):
        for ids, cache, steps in zip((one, other), caches, found, strict=True):
            steps.append(sparse(ids[:, i : i + 1], past_key_values=cache).logits)
    for steps, expected in zip(found, want, strict=True):
        assert_close(torch.cat(steps, 1), expected, torch.float32)
    branch = copy.deepcopy(caches[0])
    a, b = (sparse(one[:, :1], past_key_values=cache).logits for cache in (caches[0], branch))
    assert torch.equal(a, b)
    some = DynamicCache()  # several tokens at once go on as one by one would
    with prompt_of(sparse, 8):
        sparse(one[:, :8], past_key_values=some)
        assert_close(sparse(one[:, 8:], past_key_values=some).logits, want[0], torch.float32)


@torch.inference_mode()
def test_a_cache_that_is_used_again_forgets():
    _, sparse = sparsified()
    for compile in (None, "default"):
        decoder = Decoder(sparse, 20, compile=compile)
        for ids in (prompts(1, 9, seed=4), prompts(1, 9, seed=5), prompts(1, 2, seed=6)):
            split = ids.shape[1] - 1
            decoder.prefill(ids[:, :split])
            assert_close(decoder.step(ids[:, split:]), decoded(sparse, ids, split)[:, 0], torch.float32)


@torch.inference_mode()
def test_beams_of_one_prompt_share_their_core():
    tok = tokenizer()
    _, sparse = sparsified()
    batch = tok(["Hello there", "xyz"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "return_dict_in_generate": True}
    together = sparse.generate(**batch, **options)
    cores = together.past_key_values.sandcat_prompt.cores
    for core in cores.values():
        assert torch.equal(core[0], core[1]) and torch.equal(core[0], core[2]) and torch.equal(core[3], core[5])
        assert not torch.equal(core[0], core[3])
    for row, prompt in enumerate(["Hello there", "xyz"]):
        ids = tok(prompt, return_tensors="pt")["input_ids"]
        alone = sparse.generate(ids, **options)
        assert together.sequences[row, -8:].tolist() == alone.sequences[0, -8:].tolist()
        for layer, core in alone.past_key_values.sandcat_prompt.cores.items():
            assert torch.equal(core[0], cores[layer][3 * row])


@torch.inference_mode()
def test_what_does_not_belong_together_is_refused():
    dense, sparse = sparsified()
    cache = dense(prompts(1, 6)).past_key_values
    with pytest.raises(GenerationError, match="no core neurons were chosen"):
        sparse(prompts(1, 1), past_key_values=cache)
    cache = sparse(prompts(1, 6)).past_key_values
    with pytest.raises(GenerationError, match="those of 1 prompts, and 2 sequences"):
        cache.batch_repeat_interleave(2)
        sparse(prompts(2, 1), past_key_values=cache)
    for recipe in ("coreinfer:sparsity=1", "coreinfer:votes=0", "coreinfer:clusters=0", "coreinfer:rule=stable"):
        with pytest.raises(BadRecipe):
            sandcat.sparsify(dense, None, recipe)
    for other in ("cats", "teal:sites=[gate]", "teal:sites=[down]"):
        with pytest.raises(PlanConflict, match="coreinfer"):
            sandcat.sparsify(dense, None, f"coreinfer {other}", calibration=text())


@torch.inference_mode()
def test_saved_and_loaded_it_decodes_the_same(tmp_path):
    for rule in ("stability", "similarity"):
        for other in ("", "int8 "):
            recipe = f"{other}coreinfer:sparsity=0.5,rule={rule},clusters=4"
            dense, sparse = sparsified("phi3", recipe, torch.bfloat16)
            folder = sandcat.save(sparse, tokenizer(), tmp_path / f"{rule}{other}".strip())
            again, _ = sandcat.load(folder, device="cpu")
            ids = prompts(2, 12)
            assert torch.equal(decoded(sparse, ids, 7), decoded(again, ids, 7))
            assert not torch.equal(decoded(again, ids, 7), decoded(dense, ids, 7))


@torch.inference_mode()
def test_all_are_scored_on_what_follows_the_prompt():
    dense, sparse = sparsified()
    cats = copy.deepcopy(dense)
    sandcat.sparsify(cats, None, Cats(sparsity=0.5), calibration=text())
    words = text(512, 32, seed=9)
    (found, dropped), (other, _) = evaluate_text(dense, [sparse, cats], words)
    assert (found.prompt, found.tokens, other.tokens) == (8, 16 * 23, 16 * 23)
    assert set(dropped.values()) == {0.5}
    p = dense(words.ids_NL).logits.log_softmax(-1)[:, 8:-1]
    q = torch.cat([decoded(sparse, ids[None, :-1], 8) for ids in words.ids_NL]).log_softmax(-1)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    with every_token_sparse(cats):
        r = cats(words.ids_NL).logits.log_softmax(-1)[:, 8:-1]
    assert other.kl == pytest.approx(float((p.exp() * (p - r)).sum(-1).mean()), rel=1e-3)
    with pytest.raises(DataError, match="too short"):
        evaluate_text(dense, [sparse], text(256, 8))


@torch.inference_mode()
def test_answers_are_scored_as_decoding_after_their_question():
    pytest.importorskip("lm_eval")
    from sandcat.lm_eval_model import AfterPrompts

    _, sparse = sparsified()
    requests = [
        (("", ""), prompts(n, seed=n).tolist(), prompts(m, seed=m).tolist()) for n, m in ((9, 4), (5, 1), (9, 2))
    ]
    model = AfterPrompts(sparse, tokenizer=tokenizer(), batch_size=2, softmax_dtype="float32")
    with every_token_sparse(sparse):
        found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, answer), (likelihood, _) in zip(requests, found, strict=True):
        logits = decoded(sparse, torch.tensor([context + answer[:-1]]), len(context) - 1)[0]
        want = logits.log_softmax(-1)[range(len(answer)), answer].sum()
        assert likelihood == pytest.approx(float(want), rel=1e-4)


def test_clusters_are_found():
    """Three kinds of sentences, far apart, come out as three centres, whatever their order."""
    kinds = F.one_hot(torch.tensor([3, 20, 50]), 72).float()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)) % 3
    votes = kinds[order] + 0.01 * torch.rand(60, 72, generator=torch.Generator().manual_seed(1))
    assert sorted(centres_of(votes, 3).argmax(-1).tolist()) == [3, 20, 50]
    assert centres_of(votes[:2], 4).isfinite().all()


def test_options_reach_the_module():
    assert not Coreinfer().calibrated and Coreinfer(rule="similarity").calibrated
    _, sparse = sparsified(recipe="coreinfer:sparsity=0.25,votes=0.5,score=absolute,layers=[1]")
    ((name, module),) = sparse_modules(sparse).items()
    assert name == "model.layers.1.mlp"
    assert (module.kept_neurons, module.votes, module.signed) == (54, 0.5, False)
