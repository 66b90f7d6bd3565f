"""lm-eval's views of our models. It needs lm-eval: tasks.py imports it when it runs, and it is a command of its own:

    python -m sandcat.lm_eval_model --model sandcat --model_args pretrained=FOLDER --tasks piqa

is lm-eval's own command line with the model `sandcat` in it. (lm-eval has no plug point for packages that it does not
import itself. In a script of your own: import this module, then `lm_eval.simple_evaluate(model="sandcat", ...)`.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from sandcat.checkpoints.load import load
from sandcat.data import check_ids
from sandcat.layers.modes import chooses_in_prompt, every_token_sparse
from sandcat.models.rotary import forget_length, grows, steady_length
from sandcat.support import processes


class Exact(HFLM):
    """lm-eval's model of a transformers model, but for what it gets wrong: an answer does not change with the answers
    that are asked for beside it, a text is read after one first token, and token ids exist."""

    def tok_encode(self, *args, **kwargs):
        ids = super().tok_encode(*args, **kwargs)
        check_ids(torch.tensor(ids, dtype=torch.long), self.model, "a text of the task")
        return ids

    def tok_batch_encode(self, *args, **kwargs):
        ids_BT, mask_BT = super().tok_batch_encode(*args, **kwargs)
        check_ids(ids_BT, self.model, "a text of the task, or its padding,")
        return ids_BT, mask_BT

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        def factors(request) -> int:
            _, context, continuation = request
            return self.rotary_factors(min(len(context) + len(continuation) - 1, self.max_length))

        return grouped(requests, factors, lambda part: super(Exact, self)._loglikelihood_tokens(part, *args, **kwargs))

    def _model_call(self, *args, **kwargs):
        forget_length(self.model)
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args, **kwargs):
        forget_length(self.model)
        return super()._model_generate(*args, **kwargs)

    def loglikelihood_rolling(self, *args, **kwargs):
        """lm-eval puts a first token before the text, where the tokenizer has put one too, and scores that as well."""
        before = vars(self)["add_bos_token"]
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(*args, **kwargs)
        finally:
            self.add_bos_token = before

    def generate_until(self, requests, *args, **kwargs):
        def crosses(request) -> bool:
            context, options = request.args
            new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            return self.rotary_factors(len(self.tok_encode(context)) + new) > 0

        def ask(part):
            each = [[request] for request in part] if crosses(part[0]) else [part]
            return [answer for some in each for answer in super(Exact, self).generate_until(some, *args, **kwargs)]

        return grouped(requests, crosses, ask)

    def rotary_factors(self, length: int) -> int:
        """A number for the rotary factors that texts of a length have; a batch has those of its longest text."""
        steady = steady_length(self.model.config)
        if steady is None or length <= steady:
            return 0
        return length if grows(self.model.config) else 1


def grouped(requests: Sequence, key: Callable[..., int], ask: Callable[[list], list]) -> list:
    """The answers to all requests, where only those with the same key are asked for at once."""
    places = defaultdict(list)
    for place, request in enumerate(requests):
        places[key(request)].append(place)
    answers = [None] * len(requests)
    for _, here in sorted(places.items()):
        for place, answer in zip(here, ask([requests[place] for place in here]), strict=True):
            answers[place] = answer
    return answers


class AfterPrompts(Exact):
    """Computes a question as prompt and what is scored as decoding after it.

    The question's last token, whose logits score the first token of an answer, is decoded too, so that no scored figure
    comes from the dense prompt.
    """

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        def length(request) -> int:
            _, context, continuation = request
            cut = max(0, len(context) + len(continuation) - 1 - self.max_length)  # lm-eval drops these on the left
            return len(context) - cut

        def ask(part):
            with every_token_sparse(self.model, prompt=length(part[0]) - 1):
                return super(AfterPrompts, self)._loglikelihood_tokens(part, *args, **kwargs)

        return grouped(requests, length, ask)


@register_model("sandcat")
class SandcatLM(AfterPrompts):
    """A sparse folder by its name; what is scored is computed sparsely, as `sandcat eval --tasks` has it.

    Args:
        pretrained: a folder, a hub id, or `EMBEDDED`.
        dense: the dense model of the same files.
        device, dtype, trust_remote_code: as `load`.
        options: of lm-eval's `hf` model, such as batch_size and max_length.
    """

    def __init__(
        self,
        pretrained: str,
        dense: bool = False,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        **options,
    ):
        model, tokenizer = load(
            pretrained, dense=dense, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        super().__init__(model, tokenizer=tokenizer, **{"softmax_dtype": "float32", **options})

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        if chooses_in_prompt(self.model):
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        with every_token_sparse(self.model):
            return Exact._loglikelihood_tokens(self, requests, *args, **kwargs)

    def generate_until(self, *args, **kwargs):
        with every_token_sparse(self.model):  # `generate` says what is the prompt of a model that chooses in it
            return super().generate_until(*args, **kwargs)


def over_processes(model: LM) -> None:
    """Lets several processes share what a model is asked; each then has all answers."""

    def shared(ask: Callable[..., list]) -> Callable[..., list]:
        def ask_mine(requests: list, *args, **kwargs) -> list:
            return processes.in_order(ask(processes.mine(requests), *args, **kwargs))

        return ask_mine

    if processes.count() > 1 and "loglikelihood" not in vars(model):
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(model, kind, shared(getattr(model, kind)))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
