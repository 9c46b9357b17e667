"""Options that several kinds of `llava-fast make-data` share, and how each of them begins and ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fast.cli.options import load_model
from llava_fast.errors import DataError

Out = Annotated[Path, typer.Option("--out", "-o", help="The data to write: .json (a list) or .jsonl (lines).")]
TextsFolder = Annotated[
    Path | None,
    typer.Option("--texts", help="A folder of your own prompts and lists, as `make-data texts` copies them out."),
]
Seed = Annotated[int, typer.Option(help="What is drawn depends on this number alone.")]
RecordFiles = Annotated[
    list[str] | None,
    typer.Argument(help='Records: .json or .jsonl, globs too: {"image": path, "captions": [...], "boxes": [...]}.'),
]
CocoCaptions = Annotated[
    list[str], typer.Option("--coco-captions", help="COCO's captions_train2017.json as records; repeatable.")
]
CocoInstances = Annotated[
    list[str], typer.Option("--coco-instances", help="COCO's instances_train2017.json, for boxes; repeatable.")
]
Prefix = Annotated[str, typer.Option(help="Put before COCO's file names: train2017/.")]


DataFiles = Annotated[list[str], typer.Argument(help="LLaVA-format data: .json or .jsonl, globs too.")]
ImagesFolder = Annotated[Path, typer.Option(help="The folder that image and video paths are relative to.")]


def shares_of(given: Sequence[str], option: str, form: str) -> dict[str, float]:
    return {name: share for _, name, share in _named(given, option, form)}


def counts_of(given: Sequence[str], option: str, form: str) -> dict[str, int]:
    counts = {}
    for each, name, count in _named(given, option, form):
        if not count.is_integer():
            raise DataError(f"{option} {each!r} is not {form}")
        counts[name] = int(count)
    return counts


def _named(given: Sequence[str], option: str, form: str) -> Iterator[tuple[str, str, float]]:
    """Each text NAME=NUMBER with its parts. Raises DataError for a number that is negative or not finite."""
    for each in given:
        name, _, number = each.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not 0 <= value < math.inf:
            raise DataError(f"{option} {each!r} is not {form}")
        yield each, name, value


def records_of(
    files: Sequence[str] | None, captions: Sequence[str], instances: Sequence[str], prefix: str
) -> list[Any]:
    from llava_fast.datagen.records import read_coco, read_records

    if bool(files) == bool(captions):
        raise DataError("give either files of records or --coco-captions")
    return read_records(files) if files else read_coco(captions, instances, prefix)


def nearest_of(
    related: str, texts: list[str], media: list[Any], count: int, model: str | None, images: Path, device: str | None
) -> list[list[int]]:
    """The numbers of what is most alike, by text or by the pictures' features."""
    from llava_fast.datagen import similarity

    similarity.check_sklearn()
    if related == "text":
        return similarity.nearest(similarity.text_vectors(texts), count, media)
    if model is None:
        raise DataError("--related image compares what a model's tower sees: give --model")
    loaded = load_model(model, device, None, None, None)
    distinct = list(dict.fromkeys(media))
    vectors = similarity.image_vectors(loaded, [str(images / each[0]) for each in distinct])
    place = {each: number for number, each in enumerate(distinct)}
    return similarity.nearest(vectors[[place[each] for each in media]], count, media)


def finish(out: Path, samples: Iterator[dict[str, Any]], report: Any) -> None:
    """Write the data and the report, and say what became of all."""
    from llava_fast.datagen.output import write_report, write_samples

    count = write_samples(out, samples)
    beside = write_report(out, report)
    for line in report.lines():
        typer.echo(line)
    typer.echo(f"wrote {out} and {beside}")
    if not count:
        raise DataError("no sample was made: the reasons are above")
