"""`llava-fast data`: check training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_fast.errors import DataError

app = typer.Typer(
    help="Check training data before training on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def data() -> None:
    """Check training data before training on it."""


@app.command()
def check(
    recipe_or_data: Annotated[
        str,
        typer.Argument(
            help="A recipe or its name; or data: .json, .jsonl, a quoted glob, '{a,b}.json', a .yaml mixture."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The model whose tokenizer, template and tiling are used. Default: the recipe's."
        ),
    ] = None,
    images: Annotated[
        str, typer.Option(help="The folder to which image and video paths are relative. Default: the data file's.")
    ] = "",
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of a sample. Default: the recipe's, or the model's.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="A built-in chat template, as vicuna_v1. Default: the recipe's, or the model's.")
    ] = None,
    label_mask: Annotated[
        Literal["answers", "original"] | None, typer.Option(help="Which tokens are supervised. Default: answers.")
    ] = None,
    histogram: Annotated[
        Path | None, typer.Option(help="Write a histogram of sample lengths to this file (.png, .pdf or .svg).")
    ] = None,
    json_output: Annotated[Path | None, typer.Option("--json", help="Write a full report to this file.")] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read only image headers: fast, but does not find truncated files.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read samples and images.")] = 4,
    set_: Annotated[
        list[str], typer.Option("--set", "-s", help="Change a recipe's field: -s data.max_length=4096; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Find problems in training data, and measure its samples, before any GPU time is spent.

    \b
    llava-fast data check recipe.yaml
    llava-fast data check llava-1.5-stage1 -s data.sources.0.path=mine.json
    llava-fast data check data.json --images pictures/ -m llava-hf/llava-1.5-7b-hf
    llava-fast data check 'part-*.jsonl' --json report.json --histogram lengths.png

    \b
    It finds: images that are missing or cannot be decoded; turns in the wrong
    order; <image> placeholders that do not match the images; answers that cannot be
    masked; samples that are too long; data files that are not JSON. Without a model
    (no recipe and no --model) it checks files and turns and does not count tokens.

    \b
    A data set is a JSON list (or JSON lines) of samples:
    {"id": "7", "image": "cat.jpg", "conversations": [
      {"from": "human", "value": "<image>\\nWhat is this?"},
      {"from": "gpt", "value": "A cat."}]}
    "image" may be a list, or missing; "video" names a video.

    \b
    The exit code is 0 if all samples can be trained on, else 1. Training with
    the same recipe reuses these measurements.
    """
    from rich.console import Console

    from llava_fast.train.data import check as data_check

    if histogram is not None:
        data_check.check_picture_path(histogram)
    if json_output is not None:
        data_check.check_parent(json_output)
    plan = data_check.plan_for(recipe_or_data, model, images, max_length, template, label_mask, set_)
    if histogram is not None and plan.model is None:
        raise DataError("a histogram needs a model to count tokens: give --model")
    report = data_check.check(plan, workers, decode=not headers_only)
    data_check.show(report, Console())
    if json_output is not None:
        json_output.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {json_output}")
    if histogram is not None and report.tokens:
        data_check.save_histogram(report, histogram)
        typer.echo(f"wrote {histogram}")
    if report.stops:
        raise typer.Exit(1)
