"""lm-eval's view of a model that chooses in a prompt what it computes after it. It needs lm-eval: only tasks.py imports
it, when it runs."""

from __future__ import annotations

from collections import defaultdict

from lm_eval.models.huggingface import HFLM

from sandcat.evaluate import every_token_sparse


class AfterPrompts(HFLM):
    """Computes a question as prompt and what is scored as decoding after it.

    The question's last token, whose logits score the first token of an answer, is decoded too, so that no scored figure
    comes from the dense prompt.
    """

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        by_length = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            cut = max(0, len(context) + len(continuation) - 1 - self.max_length)  # lm-eval drops these on the left
            by_length[len(context) - cut].append(place)
        answers = [None] * len(requests)
        for length, places in sorted(by_length.items()):
            with every_token_sparse(self.model, prompt=length - 1):
                found = super()._loglikelihood_tokens([requests[place] for place in places], *args, **kwargs)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
        return answers
