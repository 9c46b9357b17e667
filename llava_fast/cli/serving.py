"""`llava-fast serve`: serve a model with OpenAI's HTTP API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llava_fast.cli.options import Device, Dtype, KvCache, Model, ModelBase, Precision, Quantize, Template, load_model
from llava_fast.errors import ServeError

API_KEY = "LLAVA_FAST_API_KEY"
ACCESS, LIMITS, MEMORY = "Access", "Limits", "Memory and threads"


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="The address to listen on. 0.0.0.0: all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0: a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model name for clients. Default: the last part of MODEL.")
    ] = None,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KvCache = None,
    precision: Precision = None,
    video_frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames used of a video. Default: 16, but LLaMA-VID: 1 a second. InstructBLIP: always 4."
        ),
    ] = None,
    api_key: Annotated[
        list[str],
        typer.Option(
            rich_help_panel=ACCESS,
            help="An API key that clients may send; repeat for several. Other users of this machine can read command "
            "lines, so prefer the variable LLAVA_FAST_API_KEY (one key) or a file.",
        ),
    ] = [],  # noqa: B006
    api_key_file: Annotated[
        Path | None, typer.Option(rich_help_panel=ACCESS, help="A file with one API key per line.")
    ] = None,
    allow_remote: Annotated[
        list[str],
        typer.Option(
            rich_help_panel=ACCESS,
            help="Allow fetching images and videos from this host (*.example.org: all subdomains); repeat for several. "
            "Private addresses are never fetched.",
        ),
    ] = [],  # noqa: B006
    allow_files: Annotated[
        list[Path],
        typer.Option(rich_help_panel=ACCESS, help="Allow clients to use files in this folder; repeat for several."),
    ] = [],  # noqa: B006
    host_name: Annotated[
        list[str],
        typer.Option(
            rich_help_panel=ACCESS,
            help="An accepted host name besides localhost and IP addresses (*: any); repeat for several.",
        ),
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str],
        typer.Option(rich_help_panel=ACCESS, help="Allow web pages of this origin (https://HOST) (CORS)."),
    ] = [],  # noqa: B006
    literal_text: Annotated[
        bool,
        typer.Option(
            rich_help_panel=ACCESS,
            help="Treat control tokens and <image> in a client's text as ordinary text. Off: only for trusted clients.",
        ),
    ] = True,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            help="Greedy answers are bit-identical to `generate`, whatever runs at the same time. Slower: prompts are "
            "not reused or chunked, and without plain float32 weights on a CPU each answer decodes separately."
        ),
    ] = False,
    max_running: Annotated[
        int, typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum answers generated at once.")
    ] = 32,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0, rich_help_panel=LIMITS, help="Maximum answers that wait beyond those; more get status 429."
        ),
    ] = 128,
    max_choices: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum answers per request.")] = 8,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum prompt tokens. Default: the context length."),
    ] = None,
    max_answer_tokens: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum answer tokens. Default: up to the context length."),
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum images per request.")] = 16,
    max_megapixels: Annotated[
        float,
        typer.Option(
            min=0.001, rich_help_panel=LIMITS, help="Maximum pixels of an image, or of a video's used frames."
        ),
    ] = 64,
    max_frames: Annotated[
        int, typer.Option(min=1, rich_help_panel=LIMITS, help="Maximum frames of a video file, used or not.")
    ] = 3000,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, rich_help_panel=LIMITS, help="Maximum size of a body, file or video (MB).")
    ] = 32,
    deadline: Annotated[float, typer.Option(rich_help_panel=LIMITS, help="Maximum seconds per request.")] = 600,
    drain: Annotated[
        float, typer.Option(rich_help_panel=LIMITS, help="Seconds for running answers to finish after SIGTERM.")
    ] = 30,
    chunk_rows: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=MEMORY,
            help="Prompt tokens per step: fewer delay running answers less, more process long prompts faster.",
        ),
    ] = 1024,
    prefix_mb: Annotated[
        float, typer.Option(min=0, rich_help_panel=MEMORY, help="KV cache kept for prompts with a common prefix.")
    ] = 1024,
    feature_mb: Annotated[
        float, typer.Option(min=0, rich_help_panel=MEMORY, help="Features kept for images that recur.")
    ] = 256,
    workers: Annotated[
        int, typer.Option(min=1, rich_help_panel=MEMORY, help="Threads that read images and tokenise.")
    ] = 2,
) -> None:
    """Serve a model over HTTP with OpenAI's API: chat completions, completions, models, health and metrics.

    llava-fast serve llava-hf/llava-v1.6-mistral-7b-hf --port 8000

    Use any OpenAI client, with images as data URIs:

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=..., messages=...)

    docs/serving.md lists the supported fields, and shows a systemd unit and a Dockerfile.
    """
    from llava_fast.serve import server
    from llava_fast.serve.settings import Settings

    server.check_packages()
    server.check_address(host, port)
    settings = Settings(
        model_name=name or Path(os.path.abspath(model)).name,
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
    options = {"quantize": quantize, "kv_cache": kv_cache, "precision": precision}
    server.serve(
        load_model(model, device, dtype, chat_template, model_base, **options),
        settings,
        host,
        port,
    )


def _api_keys(given: list[str], path: Path | None) -> tuple[str, ...]:
    """The keys from options, file and variable (one key). Raises ServeError if one of them is empty."""
    if not given and (key := os.environ.get(API_KEY)) is not None:
        if not key.strip():
            raise ServeError(f"{API_KEY} is set but has no key: give it one, or unset it")
        given = [key.strip()]
    if path is None:
        return tuple(given)
    try:
        keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--api-key-file {path} cannot be read: {error}") from error
    if not keys:
        raise ServeError(f"--api-key-file {path} has no key: write one per line")
    return (*given, *keys)
