"""`generate` of a model whose methods have to know the prompt: it says how long it is. See prompts.py."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from sandcat.errors import GenerationError
from sandcat.layers.prompts import PAGED, PROMPT, Prompts
from sandcat.layers.reading import Told
from sandcat.models.in_place import InPlace


class _Telling(InPlace):
    """A way to generate that says what it knows to the prompts of its model."""

    def __init__(self, model: nn.Module, prompts: Prompts):
        super().__init__(model, prompts)
        self.prompts = prompts


class Generate(_Telling):
    """What is given is the prompt, what is written is not, in whatever parts the model reads it."""

    name = "generate"

    def __call__(self, *args, **kwargs) -> Any:
        method = self.__wrapped__
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        with self.prompts.tell(self._told({**given, **given.pop("kwargs", {})})):
            return method(*args, **kwargs)

    def _told(self, given: dict[str, Any]) -> Told:
        outer, config = self.prompts.told.get(), _config(self.model, given)
        told = Told(sparse=outer is not None and outer.sparse, together=None if outer is None else outer.together)
        told.generates = True
        before = getattr(given.get("past_key_values"), PROMPT, None)
        if config.is_assistant and before is not None:  # it was called before, with a part of what it is given now
            told.prompt, told.again = before.tokens, True
        elif (
            config.prefill_chunk_size is not None
            or config.get_generation_mode(given.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION
        ):
            told.prompt = _prompt_length(given)
        return told


class ContinuousBatching(_Telling):
    """Refused here, as what a background thread raises does not reach who called it."""

    name = "init_continuous_batching"

    def __call__(self, *args, **kwargs) -> Any:
        if self.prompts.chooses or self.prompts.matters:
            raise GenerationError(PAGED)
        return self.__wrapped__(*args, **kwargs)


def follow_generation(model: nn.Module, prompts: Prompts) -> None:
    """Has the model's own ways to generate say what they know."""
    for kind in (Generate, ContinuousBatching):
        if hasattr(type(model), kind.name):
            setattr(model, kind.name, kind(model, prompts))


def _config(model: nn.Module, given: dict[str, Any]) -> GenerationConfig:
    """What `generate` will go by: its arguments, else those of the config that it is given, else the model's."""
    config = copy.copy(given.get("generation_config") or model.generation_config)
    for name, default in vars(model.generation_config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, default)
    for name in vars(config).keys() & given.keys():
        setattr(config, name, given[name])
    return config


def _prompt_length(given: dict[str, Any]) -> int:
    """Tokens of the prompt, those that are cached already and padding included."""
    mask = given.get("attention_mask")  # which is as long, also where only new tokens are given
    tokens = [given[name] for name in ("inputs_embeds", "inputs", "input_ids") if given.get(name) is not None]
    longest = [mask] if mask is not None and mask.dim() == 2 else tokens
    return longest[0].shape[1] if longest else 1  # which begins the text
