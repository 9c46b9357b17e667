"""llava-fast serve: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llava_fast.cli.options import Device, Dtype, Model, ModelBase, Template, load_model
from llava_fast.errors import ServeError


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="The address to listen on. 0.0.0.0: every one this machine has.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0: a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The name that clients ask for. Default: MODEL's last part.")] = None,
    api_key: Annotated[
        list[str],
        typer.Option(
            envvar="LLAVA_FAST_API_KEY",
            show_envvar=True,
            help="A key, of which a client must send one; repeat for several. Other users of this machine can read a "
            "command line, so prefer the variable or a file.",
        ),
    ] = [],  # noqa: B006
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, a line each.")] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Most answers made at once.")] = 32,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Most answers that wait beyond those; more are refused with 429.")
    ] = 128,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take in all.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds that running answers may still take after SIGTERM.")] = 30.0,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images and tokenise.")] = 2,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API: /v1/chat/completions, /v1/models, /health.

    llava-fast serve llava-hf/llava-v1.6-mistral-7b-hf --port 8000

    Ask it with any OpenAI client, images as data URIs:
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=..., messages=...)
    """
    from llava_fast.serve import server
    from llava_fast.serve.settings import Settings

    server.check_packages()

    settings = Settings(
        model_name=name or Path(model).name,
        api_keys=_api_keys(api_key, api_key_file),
        max_running=max_running,
        max_waiting=max_waiting,
        deadline=deadline,
        drain=drain,
        workers=workers,
    )
    server.serve(load_model(model, device, dtype, chat_template, model_base), settings, host, port)


def _api_keys(given: list[str], path: Path | None) -> tuple[str, ...]:
    if path is None:
        return tuple(given)
    try:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--api-key-file {path} cannot be read: {error}") from error
    if not keys:
        raise ServeError(f"--api-key-file {path} holds no key: write one a line")
    return (*given, *keys)
