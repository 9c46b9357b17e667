"""llava-fast batch: one question about many pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fast.cli.options import Device, Dtype, KvCache, Model, ModelBase, Quantize, Template
from llava_fast.errors import BatchError

SOME_ERRORS, STOPPED = 3, 130
SPACES = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""llguidance's options: JSON spaced as json.dumps does, because some models otherwise write spaces without end."""
COLUMNS, DRAWING, SPEED, RAY = "Rows of the input", "Choosing tokens", "Memory and threads", "Ray"


def batch(
    model: Model,
    input: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures or videos, or of shards; a table (.jsonl, .json, .csv, .tsv, .parquet); "
            "WebDataset shards (.tar, .tar.gz); or a quoted glob of tables or shards ('shards/*.tar')."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The file to write, a JSON object a line. It goes on where it ended.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The question. {column} stands for a row's value, {{ and }} for braces. Default: the column prompt or "
            "question.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the question.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A file with a JSON schema: answers are JSON values that match it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows, from the first on.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the output anew, whatever it holds.")] = False,
    image_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=COLUMNS,
            help="A table's column of pictures: paths, data URIs, bytes, or lists of them. Default: image, images, "
            "image_path, file_name, filename or path.",
        ),
    ] = None,
    video_column: Annotated[
        str | None, typer.Option(rich_help_panel=COLUMNS, help="A table's column of videos. Default: video.")
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=COLUMNS,
            help="The column that an output row's id comes from; '#' numbers rows. Default: id.",
        ),
    ] = None,
    image_folder: Annotated[
        str | None,
        typer.Option(rich_help_panel=COLUMNS, help="What a table's paths are relative to. Default: its own folder."),
    ] = None,
    literal_text: Annotated[
        bool,
        typer.Option(
            rich_help_panel=COLUMNS,
            help="Control tokens and <image> in prompts are ordinary text. Off: <image> places a picture.",
        ),
    ] = True,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "--max-new-tokens", min=0, rich_help_panel=DRAWING, help="The most tokens of an answer."
        ),
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, rich_help_panel=DRAWING, help="0 takes the likeliest token; above 0 draws.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(rich_help_panel=DRAWING, help="Draw among the likeliest that make up this probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, rich_help_panel=DRAWING, help="Draw among so many likeliest tokens (0: all).")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(
            rich_help_panel=DRAWING, help="Draw among tokens of at least this part of the best's probability."
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(rich_help_panel=DRAWING, help="Above 1: tokens seen before are less likely.")
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(min=0, rich_help_panel=DRAWING, help="Row i draws from this seed + i, whatever runs beside it."),
    ] = 0,
    stop: Annotated[
        list[str], typer.Option(rich_help_panel=DRAWING, help="A string that ends an answer; repeat for several.")
    ] = [],  # noqa: B006
    video_frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames used of a video. Default: 16, but LLaMA-VID: 1 a second. InstructBLIP: always 4."
        ),
    ] = None,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KvCache = None,
    max_running: Annotated[int, typer.Option(min=1, rich_help_panel=SPEED, help="Most answers made at once.")] = 32,
    workers: Annotated[
        int, typer.Option(min=1, rich_help_panel=SPEED, help="Threads that read pictures and tokenise.")
    ] = 2,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant",
            rich_help_panel=SPEED,
            help="Answers equal those of each row alone to the bit, near-ties included. Slower, see docs/serving.md.",
        ),
    ] = False,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            rich_help_panel=RAY,
            help="Answer on a Ray cluster (pip install 'llava_fast\\[ray]'): RAY_ADDRESS's, or Ray started here.",
        ),
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(rich_help_panel=RAY, help="The cluster: auto, HOST:PORT or ray://HOST:PORT.")
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=RAY, help="Models loaded side by side. Default: a GPU's or core's each."),
    ] = None,
) -> None:
    """Ask a model about many pictures or videos: a row of JSON for each, in the input's order.

    \b
    llava-fast batch MODEL photos/ captions.jsonl --prompt "Describe the picture."
    llava-fast batch MODEL questions.csv answers.jsonl --prompt "{question} Answer in one word."
    llava-fast batch MODEL 'shards/*.tar' tags.jsonl -p "List the objects." --schema tags.json

    A row is {"id", "answer", "finish_reason", "usage"}, or {"id", "error"} for a picture that cannot be read or asked
    about. After a kill, or Ctrl-C, the same command without --overwrite goes on: no row is made twice and none is
    lost. What the batch is stands in OUTPUT.run.json; another input, model, prompt or option is refused.

    \b
    Exit codes: 0 all rows are answers; 1 the batch could not run, or not on; 2 wrong options; 3 some rows are errors;
    130 stopped by Ctrl-C or SIGTERM.
    """
    from llava_fast.batch.answering import Settings
    from llava_fast.batch.job import ModelSpec, Runs, in_process, run
    from llava_fast.batch.output import GO_ON
    from llava_fast.batch.source import open_source
    from llava_fast.generation.grammar import Grammar
    from llava_fast.generation.sampling import Sampling

    source = open_source(input, image_column, video_column, id_column, image_folder)
    sampling = Sampling(
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        grammar=None if schema is None else Grammar.json_schema({"x-guidance": SPACES, **_schema(schema)}),
    )
    settings = Settings(
        prompt=prompt,
        system=system,
        sampling=sampling,
        literal_text=literal_text,
        video_frames=video_frames,
        max_running=max_running,
        workers=workers,
        batch_invariant=batch_invariant,
    )
    options = {
        "model_base": model_base,
        "chat_template": chat_template,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "kv_cache": kv_cache,
    }
    runs: Runs = in_process
    if ray or ray_address is not None or ray_workers is not None:
        from llava_fast.batch.cluster import Cluster, check_ray

        check_ray()
        runs = Cluster(ray_address, ray_workers)
    result = run(
        ModelSpec(model, options), source, str(output), settings, limit=limit, overwrite=overwrite, runs=runs, say=_say
    )
    answers = result.rows - result.errors
    rate = f", {result.answered / result.seconds:.1f} rows a second" if result.seconds else ""
    _say(f"{output}: {result.rows} rows, {answers} answers, {result.errors} errors{rate}")
    if result.first_error is not None:
        _say(f"the first error, of {result.first_error[0]!r}: {result.first_error[1]}")
    if not result.finished:
        _say(f"stopped: {GO_ON}")
        raise typer.Exit(STOPPED)
    if result.errors:
        raise typer.Exit(SOME_ERRORS)


def _schema(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BatchError(f"--schema {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BatchError(f"--schema {path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BatchError(f"--schema {path} holds no JSON schema, which is an object")
    return found


def _say(text: str) -> None:
    typer.echo(text, err=True)
