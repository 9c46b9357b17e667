"""llava-fast make-data: training data from captions, boxes and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_fast.cli import data_from_data
from llava_fast.cli.data_options import (
    CocoCaptions,
    CocoInstances,
    ImagesFolder,
    Out,
    Prefix,
    RecordFiles,
    Seed,
    TextsFolder,
    finish,
    nearest_of,
    records_of,
    shares_of,
)
from llava_fast.cli.endpoint import Asking, with_endpoint
from llava_fast.cli.options import Device
from llava_fast.errors import DataError

app = typer.Typer(
    help="Make training data: instructions, pretraining pairs, text in pictures, chains, core sets, preferences.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
@with_endpoint
def instruct(
    asking: Asking,
    out: Out,
    records: RecordFiles = None,
    coco_captions: CocoCaptions = [],  # noqa: B006
    coco_instances: CocoInstances = [],  # noqa: B006
    prefix: Prefix = "",
    mix: Annotated[
        list[str], typer.Option(help="A kind and its share, as conversation=58; repeatable. Default: LLaVA's 58/23/77.")
    ] = [],  # noqa: B006
    count: Annotated[
        int | None, typer.Option(min=1, help="How many samples to ask for. Default: one a record.")
    ] = None,
    texts: TextsFolder = None,
    seed: Seed = 0,
) -> None:
    """Conversations, detailed descriptions and reasoning, written by a language model that sees captions and boxes.

    \b
    llava-fast make-data instruct --coco-captions captions_train2017.json \\
        --coco-instances instances_train2017.json --prefix train2017/ --count 158000 \\
        --endpoint-model gpt-4.1-mini --price-in 0.4 --price-out 1.6 -o instruct.json
    llava-fast make-data instruct words.jsonl --mix text=1 -o reading.json
    llava-fast make-data instruct records.jsonl --dry-run -o data.json

    A record is {"id", "image" or "video", "captions": \\[text], "words": \\[text], "boxes": [{"label", "box":
    \\[left, top, right, bottom], as fractions}]}.

    Replies that refuse, are cut short, mention captions or boxes, mix up the roles or repeat others are left out and
    counted. Then: llava-fast data check instruct.json --images COCO_FOLDER.
    """
    from llava_fast.datagen.instruct import Instruct
    from llava_fast.datagen.output import Report, check_output
    from llava_fast.datagen.wording import Texts

    check_output(out)
    options = {"mix": shares_of(mix, "--mix", "a kind and its share, as conversation=58")} if mix else {}
    maker = Instruct(Texts(texts), count=count, seed=seed, **options)
    given = records_of(records, coco_captions, coco_instances, prefix)
    report = Report()
    with asking.opened(out) as ask:
        finish(out, maker.make(given, ask, report), report)


@app.command()
def pretrain(
    out: Out,
    records: RecordFiles = None,
    coco_captions: CocoCaptions = [],  # noqa: B006
    prefix: Prefix = "",
    tagger: Annotated[
        str, typer.Option(help="What finds noun phrases: textblob, spacy:en_core_web_sm, or your module:function.")
    ] = "textblob",
    least: Annotated[int, typer.Option(min=1, help="Phrases in fewer captions are left out.")] = 3,
    most: Annotated[int, typer.Option(min=1, help="At most so many captions are added for a phrase.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that find phrases. 0: this one.")] = 0,
    texts: TextsFolder = None,
    seed: Seed = 0,
) -> None:
    """Image-text pairs for pretraining, chosen so that concepts are covered evenly, as LLaVA's 595K of CC3M.

    \b
    llava-fast make-data pretrain cc3m.jsonl --workers 8 -o pretrain.json

    A record is {"image": path, "caption": text}. Noun phrases in fewer than 3 captions are left out; from the rarest
    on, each adds its captions, at most 100. The instruction is drawn from a list of brief ones.
    """
    from llava_fast.datagen import pretrain as making
    from llava_fast.datagen.nouns import noun_phrases
    from llava_fast.datagen.output import Report, check_output
    from llava_fast.datagen.wording import Questions, Texts

    check_output(out)
    questions = Texts(texts).read("brief", Questions)
    report = Report()
    given = making.usable(records_of(records, coco_captions, [], prefix), report)
    phrases = noun_phrases([record.captions[0] for record in given], tagger, workers)
    numbers = making.choose(phrases, least, most, seed)
    report.left_out["not needed for coverage"] += len(given) - len(numbers)
    finish(out, making.pairs(given, numbers, questions, report, seed), report)


@app.command()
def ocr(
    images: Annotated[Path, typer.Argument(help="The folder of pictures.")],
    out: Out,
    records: Annotated[
        Path | None, typer.Option(help="Also write records with the words here, for `make-data instruct --mix text=1`.")
    ] = None,
    engine: Annotated[str, typer.Option(help="rapidocr, or your module:function.")] = "rapidocr",
    least_score: Annotated[
        float, typer.Option(min=0, max=1, help="Words the engine is less sure of are left out.")
    ] = 0.5,
    least_words: Annotated[int, typer.Option(min=1, help="Pictures with fewer words are left out.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Pictures read at once.")] = 1,
    texts: TextsFolder = None,
    seed: Seed = 0,
) -> None:
    """Questions to read the text of a picture, answered by an OCR engine's words in reading order, as LLaVAR's.

    \b
    llava-fast make-data ocr posters/ -o read.json --records words.jsonl
    llava-fast make-data instruct words.jsonl --mix text=1 -o conversations.json

    The second command makes conversations about the text. Words that were read are kept beside the output, so a killed
    run goes on.
    """
    from llava_fast.datagen import ocr as making
    from llava_fast.datagen.output import Report, check_output, write_samples
    from llava_fast.datagen.wording import Questions, Texts
    from llava_fast.storage.journal import Journal

    for path in (out, *([records] if records else [])):
        check_output(path)
    if not images.is_dir():
        raise DataError(f"there is no folder of pictures {images}")
    questions = Texts(texts).read("read_text", Questions)
    report = Report()
    with Journal(out.with_name(f"{out.name}.words.jsonl")) as journal:
        paths = making.pictures(images)
        read = list(making.read_words(paths, images, engine, journal, least_score, workers))
    if records:
        write_samples(records, (each.model_dump(exclude_defaults=True) for each in read if each.words))
        typer.echo(f"wrote {records}")
    finish(out, making.samples(read, questions, report, least_words, seed), report)


@app.command()
@with_endpoint
def compare(
    asking: Asking,
    out: Out,
    records: RecordFiles = None,
    coco_captions: CocoCaptions = [],  # noqa: B006
    coco_instances: CocoInstances = [],  # noqa: B006
    prefix: Prefix = "",
    related: Annotated[
        Literal["text", "image"], typer.Option(help="Pictures are alike by their captions, or as they look to --model.")
    ] = "text",
    count: Annotated[int | None, typer.Option(min=1, help="How many pairs to ask about. Default: all.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose tower compares pictures.")] = None,
    images: ImagesFolder = Path(),
    device: Device = None,
    texts: TextsFolder = None,
    seed: Seed = 0,
) -> None:
    """Conversations about how two similar pictures differ, by a language model that sees what is known about both.

    \b
    llava-fast make-data compare records.jsonl --count 10000 -o differences.json
    llava-fast make-data compare records.jsonl --related image -m MODEL --images coco/ -o differences.json
    """
    from llava_fast.datagen.chains import two_pictures
    from llava_fast.datagen.instruct import Instruct
    from llava_fast.datagen.output import Report, check_output
    from llava_fast.datagen.wording import Texts

    check_output(out)
    given = [each for each in records_of(records, coco_captions, coco_instances, prefix) if isinstance(each.image, str)]
    media = [(each.image,) for each in given]
    near = nearest_of(related, [each.context() for each in given], media, 1, model, images, device)
    pairs = two_pictures(given, near)
    maker = Instruct(Texts(texts), {"difference": 1}, count and min(count, len(pairs)), seed)
    report = Report()
    with asking.opened(out) as ask:
        finish(out, maker.make(pairs, ask, report), report)


@app.command()
def texts(folder: Annotated[Path, typer.Argument(help="Where to copy them; files that are there stay.")]) -> None:
    """Copy out the system prompts, examples, lists of instructions and filters, to change them.

    \b
    llava-fast make-data texts my-texts/
    llava-fast make-data instruct records.jsonl --texts my-texts/ -o data.json

    A new file, say haiku.yaml, is a new kind of sample: --mix haiku=1. The comments in the files say what their fields
    are.
    """
    from llava_fast.datagen.wording import copy_texts

    for path in copy_texts(folder):
        typer.echo(f"wrote {path}")


app.command()(data_from_data.chains)
app.command("core-set")(data_from_data.core_set)
app.command()(data_from_data.preferences)
