"""`sandcat serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sandcat.cli.options import Device, Dtype, Model, Trust
from sandcat.cli.printing import err


def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: vLLM where it is installed.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="SANDCAT_API_KEY", help="Serve only who sends this key.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default its folder's name.")] = None,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together; default the model's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer; longer ones are cut.")] = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Serve a model to OpenAI clients: chat, completions, streaming. Other options go to vLLM as they are."""
    from sandcat.checkpoints.embedded import resolve
    from sandcat.checkpoints.load import read_plan
    from sandcat.serving.engines import Service, choose, serve

    folder = resolve(model)
    chosen, reason = choose(engine, folder, read_plan(folder) if Path(folder).is_dir() else None)
    err.print(f"engine: {chosen} ({reason})", style="dim", markup=False, soft_wrap=True)
    service = Service(
        folder, name or Path(folder).name, host, port, api_key, max_context, max_new_tokens, device, dtype,
        trust_remote_code, context.args,
    )  # fmt: skip
    serve(service, chosen)
