"""lm-eval's view of a model: what it scores is what the model gives for that text alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from tiny import VOCABULARY, text, tiny, tokenizer
from tokenizers.processors import TemplateProcessing

import sandcat
from sandcat.errors import DataError
from sandcat.lm_eval_model import Exact

EDGE = 24
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4, "factor": 8.0,
    "original_max_position_embeddings": EDGE,
}  # fmt: skip
GROWING = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
CHANGING = {
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": EDGE},
    "llama": {"rope_parameters": GROWING, "max_position_embeddings": EDGE},
}


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


@pytest.mark.parametrize("family", CHANGING)
def test_answers_do_not_change_with_those_beside_them(family):
    """Where rotary factors are those of the longest text of a batch: alone, in a batch, in one of another order."""
    model = tiny(family, **CHANGING[family])
    model.generation_config.eos_token_id = None
    questions = [("abc", " def"), ("abcdefgh" * 4, " a"), ("hgfedcba" * 5, " b"), ("ab" * 8, " cd"), ("x" * 23, "yz")]
    prompts = [(prompt, {"until": ["</s>"], "max_gen_toks": 6, "do_sample": False}) for prompt, _ in questions]

    def found(batch_size, order):
        one = Exact(model, tokenizer=tokenizer(), batch_size=batch_size, max_length=64)
        likely = one.loglikelihood(asked("loglikelihood", *(questions[i] for i in order)), disable_tqdm=True)
        texts = one.generate_until(asked("generate_until", *(prompts[i] for i in order)), disable_tqdm=True)
        return {i: (round(logp, 3), text) for i, (logp, _), text in zip(order, likely, texts, strict=True)}

    alone = {i: found(1, [i])[i] for i in range(len(questions))}
    assert found(5, range(5)) == found(2, (4, 1, 0, 3, 2)) == alone


def test_a_text_is_scored_after_one_first_token():
    model, tok = tiny("llama"), tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ids = tok("some text", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1 != ids[0, 1]
    want = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum()
    one = Exact(model, tokenizer=tok, batch_size=1)
    [found] = one.loglikelihood_rolling(asked("loglikelihood_rolling", ("some text",)), disable_tqdm=True)
    assert found == pytest.approx(float(want), abs=1e-3)
    assert one.tok_encode("some text") == ids[0].tolist()  # of others the tokenizer's own first token stays


def test_ids_beyond_the_vocabulary(monkeypatch):
    model, tok = tiny("llama"), tokenizer()
    tok.add_tokens(["<end>"])
    one = Exact(model, tokenizer=tok, batch_size=2)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(DataError, match=f"token id {VOCABULARY}"):
        one.loglikelihood(asked("loglikelihood", ("abc", " d"), ("abc", "<end>")), disable_tqdm=True)
    with pytest.raises(DataError, match=f"token id {VOCABULARY}"):
        one.generate_until(asked("generate_until", ("<end>", {"until": ["x"]})), disable_tqdm=True)


@pytest.mark.parametrize(
    "recipe", ["int8", "teal:sparsity=0.4,sites=all+head", "int8 teal:sparsity=0.4,sites=all+head"]
)
@torch.inference_mode()
def test_a_head_of_its_own_stays(recipe):
    """lm-eval ties the weights of head and embedding table again, whatever stands there."""
    model, ids = tiny("gemma2"), torch.randint(4, VOCABULARY, (1, 9))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sandcat.sparsify(model, None, recipe, calibration=text(256))
    head, want = model.lm_head, model(ids).logits
    Exact(model, tokenizer=tokenizer(), batch_size=1)
    assert model.lm_head is head and torch.equal(model(ids).logits, want)


def test_mixed_precision():
    """By lm-eval's option, under autocast; scores are those of the model to a few digits."""
    model = tiny("llama")
    sandcat.sparsify(model, None, "int8 teal:sparsity=0.01", calibration=text(256))
    question = asked("loglikelihood", ("abc", " def"))
    [want], [found] = (
        Exact(model, tokenizer=tokenizer(), batch_size=1, mixed_precision_dtype=dtype).loglikelihood(question)
        for dtype in (None, "bfloat16")
    )
    assert found[0] == pytest.approx(want[0], rel=0.05)
