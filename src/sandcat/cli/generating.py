"""`sandcat generate`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from sandcat.cli.options import Device, Dtype, Json, Model, Seed, Trust
from sandcat.cli.printing import err, print_json
from sandcat.errors import BadRecipe


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to write on; without it, a chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is freer.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens only; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that add up to p.")] = 1.0,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default if there is one.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the step: slow to start, then faster.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Ignore the plan: run the dense model.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write on from a prompt, or chat."""
    from sandcat.checkpoints.load import load
    from sandcat.decoding.generate import generate
    from sandcat.support.progress import shown

    if prompt is None and as_json:
        raise BadRecipe("--json needs a prompt: a chat is for people.")
    with shown(not as_json):
        net, tokenizer = load(model, dense=dense, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
        "chat": chat, "compile": "default" if compile else "fused",
    }  # fmt: skip

    def say(asked) -> str:
        pieces = []
        for piece in generate(net, tokenizer, asked, **options):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        if not as_json:
            print()
        return "".join(pieces)

    if prompt is not None:
        start = time.perf_counter()
        said = say(prompt)
        if as_json:
            print_json({"prompt": prompt, "text": said, "seconds": time.perf_counter() - start})
        return
    history: list[dict[str, str]] = []
    err.print("An empty line or Ctrl-D ends the chat.", style="dim")
    while asked := _ask():
        history.append({"role": "user", "content": asked})
        history.append({"role": "assistant", "content": say(history)})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
