"""lm-eval's views of our models. It needs lm-eval: tasks.py imports it when it runs, and it is a command of its own:

    python -m sandcat.lm_eval_model --model sandcat --model_args pretrained=FOLDER --tasks piqa

is lm-eval's own command line with the model `sandcat` in it. (lm-eval has no plug point for packages that it does not
import itself. In a script of your own: import this module, then `lm_eval.simple_evaluate(model="sandcat", ...)`.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sandcat.checkpoints.load import load
from sandcat.layers.modes import chooses_in_prompt, every_token_sparse
from sandcat.support import processes


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
            return HFLM._loglikelihood_tokens(self, requests, *args, **kwargs)


def share(model: LM) -> None:
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
