"""The decode loop against transformers' own generation, and sampling."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, text, tiny, tokenizer

import sandcat
from sandcat.decoding.decoder import Decoder
from sandcat.decoding.generate import encode, generate, sample
from sandcat.errors import DataError


@pytest.fixture
def sparse():
    model = tiny("llama")
    sandcat.sparsify(model, None, "cats", calibration=text())
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_writes(family):
    """Also past a sliding window of 16 tokens."""
    model, tok = tiny(family), tokenizer()
    sandcat.sparsify(model, None, "cats:sparsity=0.4", calibration=text())
    model.generation_config.eos_token_id = None
    prompt = "Once upon a time there was"
    ids = tok(prompt, return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    stop = (want == tok.eos_token_id).nonzero()
    want = want[: int(stop[0])] if len(stop) else want
    assert "".join(generate(model, tok, prompt, max_new_tokens=24)) == tok.decode(want, skip_special_tokens=True)


def test_stops_at_a_stop_token(sparse):
    tok = tokenizer()
    prompt = "abc"
    ids = tok(prompt, return_tensors="pt")["input_ids"]
    free = sparse.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    sparse.generation_config.eos_token_id = [free[3]]
    assert "".join(generate(sparse, tok, prompt, max_new_tokens=10)) == tok.decode(free[: free.index(free[3])])


def test_stops_at_the_end_of_the_context(sparse):
    sparse.generation_config.eos_token_id = None
    tok = tokenizer()
    tok.eos_token = None
    pieces = list(generate(sparse, tok, "x" * 250, max_new_tokens=100))
    assert len("".join(pieces)) >= 6
    with pytest.raises(DataError, match="context holds 256"):
        list(generate(sparse, tok, "x" * 256, max_new_tokens=1))


@pytest.mark.parametrize("compile", [None, "default"])
@torch.inference_mode()
@pytest.mark.usefixtures("kernels_pay")
def test_steps_batch_rewind_and_compile(sparse, compile):
    ids = torch.randint(4, 96, (3, 12))
    want = sparse(ids).logits
    decoder = Decoder(sparse, 12, batch=3, compile=compile)
    for _ in range(2):  # a prompt again after a prompt
        found = [decoder.prefill(ids[:, :6])]
        found += [decoder.step(ids[:, i : i + 1]).clone() for i in range(6, 12)]
        torch.testing.assert_close(torch.stack(found, 1), want[:, 5:], rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="is full"):
        decoder.step(ids[:, :1])
    decoder.rewind(8)
    torch.testing.assert_close(decoder.step(ids[:, 8:9]), want[:, 8], rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="more than the 12"):
        decoder.prefill(torch.ones(3, 13, dtype=torch.long))


def test_sampling():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -torch.inf]]).repeat(20_000, 1)
    p = logits[0].softmax(-1)

    def shares(**options):
        drawn = sample(logits, generator=torch.Generator().manual_seed(3), **options)
        return torch.bincount(drawn[:, 0], minlength=5) / len(drawn)

    assert sample(logits[:2]).tolist() == [[3], [3]]
    torch.testing.assert_close(shares(temperature=1.0), p, atol=0.02, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)
    two = torch.tensor([0, 0, *(p[2:4] / p[2:4].sum()).tolist(), 0])
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), two, atol=0.02, rtol=0)
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.8), two, atol=0.02, rtol=0)
    assert shares(temperature=1.0, top_p=1e-9)[3] == 1


def test_the_same_seed_the_same_text(sparse):
    def written(seed):
        return "".join(generate(sparse, tokenizer(), "abc", max_new_tokens=20, temperature=1.0, seed=seed))

    assert written(1) == written(1) != written(2)


def test_characters_of_several_tokens_come_whole():
    """A byte-level tokenizer: no piece ends inside a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=made)
    script = tok("é☃𝄞a")["input_ids"]

    class Scripted:
        """Writes the script, whatever it is fed."""

        device = torch.device("cpu")
        generation_config = type("", (), {"eos_token_id": None})

        class config:
            get_text_config = staticmethod(lambda: type("", (), {"num_hidden_layers": 0}))

        step = 0

        @staticmethod
        def get_input_embeddings():
            return torch.nn.Embedding(len(alphabet), 1)

        def __call__(self, ids, **kwargs):
            logits = torch.zeros(1, ids.shape[1], len(alphabet))
            logits[0, -1, script[self.step]] = 1
            self.step += 1
            return type("", (), {"logits": logits})

    assert list(generate(Scripted(), tok, "a", max_new_tokens=len(script))) == ["é", "☃", "𝄞", "a"]


def test_chat_template(sparse):
    tok = tokenizer()
    with pytest.raises(DataError, match="no chat template"):
        encode(tok, "x", chat=True)
    with pytest.raises(DataError, match="no chat template"):
        encode(tok, [{"role": "user", "content": "x"}])
    tok.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert tok.decode(encode(tok, "hi")[0]).replace(" ", "") == "<user>hi"
    assert tok.decode(encode(tok, "hi", chat=False)[0]).replace(" ", "") == "hi"
