"""llava-fast serve: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_fast.cli.options import Device, Dtype, Model, ModelBase, Quantize, Template, load_model
from llava_fast.errors import ServeError

API_KEY = "LLAVA_FAST_API_KEY"
ACCESS, LIMITS, MEMORY = "Who and what is let in", "Limits", "Memory and threads"


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="The address to listen on. 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0: a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The name that clients ask for. Default: MODEL's last part.")] = None,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    video_frames: Annotated[int, typer.Option(min=1, help="How many frames of a video are used.")] = 16,
    api_key: Annotated[
        list[str],
        typer.Option(
            rich_help_panel=ACCESS,
            help="A key, of which a client must send one; repeat for several. Other users of this machine can read a "
            "command line, so prefer the variable LLAVA_FAST_API_KEY (one key) or a file.",
        ),
    ] = [],  # noqa: B006
    api_key_file: Annotated[
        Path | None, typer.Option(rich_help_panel=ACCESS, help="A file of keys, a line each.")
    ] = None,
    allow_remote: Annotated[
        list[str],
        typer.Option(
            rich_help_panel=ACCESS,
            help="Fetch images and videos from this host (*.example.org: all below); repeat for several. Private "
            "addresses are never fetched.",
        ),
    ] = [],  # noqa: B006
    allow_files: Annotated[
        list[Path],
        typer.Option(rich_help_panel=ACCESS, help="Let clients name files below this folder; repeat for several."),
    ] = [],  # noqa: B006
    host_name: Annotated[
        list[str],
        typer.Option(
            rich_help_panel=ACCESS,
            help="A name of this server, besides localhost and addresses (*: any); repeat for several.",
        ),
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str],
        typer.Option(rich_help_panel=ACCESS, help="Let pages of this origin (https://HOST) ask the server (CORS)."),
    ] = [],  # noqa: B006
    literal_text: Annotated[
        bool,
        typer.Option(
            rich_help_panel=ACCESS,
            help="Control tokens and <image> spelled by a client are ordinary text. Off: for clients that you trust.",
        ),
    ] = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            help="Greedy answers equal `generate` alone to the bit, whatever runs beside them. Slower: no prompt is "
            "reused or cut, and without plain float32 weights on a CPU each answer decodes by itself."
        ),
    ] = False,
    max_running: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Most answers made at once.")] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(min=0, rich_help_panel=LIMITS, help="Most answers that wait beyond those; then clients get 429."),
    ] = 128,
    max_choices: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Most answers to a request.")] = 8,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=LIMITS, help="Longest prompt. Default: the context's length.")
    ] = None,
    max_answer_tokens: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=LIMITS, help="Longest answer. Default: what the context holds.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Most images in a request.")] = 16,
    max_megapixels: Annotated[
        float,
        typer.Option(min=0.001, rich_help_panel=LIMITS, help="Most pixels of an image, or of a video's used frames."),
    ] = 64,
    max_frames: Annotated[
        int, typer.Option(min=1, rich_help_panel=LIMITS, help="Most frames of a video file, used or not.")
    ] = 3000,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="Largest body, file or video (MB).")
    ] = 32,
    deadline: Annotated[float, typer.Option(rich_help_panel=LIMITS, help="Seconds a request may take in all.")] = 600,
    drain: Annotated[
        float, typer.Option(rich_help_panel=LIMITS, help="Seconds that running answers may take after SIGTERM.")
    ] = 30,
    chunk_rows: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=MEMORY,
            help="Prompt tokens run in one step: fewer stall running answers less, more read long prompts faster.",
        ),
    ] = 1024,
    prefix_mb: Annotated[
        float, typer.Option(min=0, rich_help_panel=MEMORY, help="Keys and values kept for prompts that begin alike.")
    ] = 1024,
    feature_mb: Annotated[
        float, typer.Option(min=0, rich_help_panel=MEMORY, help="Image features kept for images that come again.")
    ] = 256,
    workers: Annotated[
        int, typer.Option(min=1, rich_help_panel=MEMORY, help="Threads that read images and tokenise.")
    ] = 2,
) -> None:
    """Serve a model over HTTP as OpenAI's API: chat completions, completions, models, health and metrics.

    llava-fast serve llava-hf/llava-v1.6-mistral-7b-hf --port 8000

    Ask it with any OpenAI client, images as data URIs:

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=..., messages=...)

    docs/serving.md says which fields are served, and shows a systemd unit and a Dockerfile.
    """
    from llava_fast.serve import server
    from llava_fast.serve.settings import Settings

    server.check_packages()
    settings = Settings(
        model_name=name or Path(model).name,
        api_keys=_api_keys(api_key, api_key_file),
        allow_remote=tuple(allow_remote),
        allow_files=tuple(allow_files),
        host_names=tuple(host_name),
        allow_origins=tuple(allow_origin),
        literal_text=literal_text,
        batch_invariant=batch_invariant,
        max_running=max_running,
        max_waiting=max_waiting,
        max_choices=max_choices,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        max_images=max_images,
        max_pixels=round(max_megapixels * 1e6),
        max_frames=max_frames,
        max_body_bytes=round(max_body_mb * 1e6),
        max_held_bytes=max(512 << 20, round(max_body_mb * 4e6)),
        max_remote_bytes=round(max_body_mb * 1e6),
        deadline=deadline,
        drain=drain,
        chunk_rows=chunk_rows,
        prefix_bytes=round(prefix_mb * 1e6),
        feature_bytes=round(feature_mb * 1e6),
        workers=workers,
        video_frames=video_frames,
    )
    server.serve(load_model(model, device, dtype, chat_template, model_base, quantize=quantize), settings, host, port)


def _api_keys(given: list[str], path: Path | None) -> tuple[str, ...]:
    """The keys of options, file and variable, which holds one. Raises ServeError where one of them holds none."""
    if not given and (key := os.environ.get(API_KEY)) is not None:
        if not key.strip():
            raise ServeError(f"{API_KEY} is set and holds no key: give it one, or unset it")
        given = [key.strip()]
    if path is None:
        return tuple(given)
    try:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--api-key-file {path} cannot be read: {error}") from error
    if not keys:
        raise ServeError(f"--api-key-file {path} holds no key: write one a line")
    return (*given, *keys)
