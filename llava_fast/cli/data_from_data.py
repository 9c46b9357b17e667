"""llava-fast make-data chains | core-set | preferences: training data from training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_fast.cli.data_options import (
    CocoCaptions,
    CocoInstances,
    DataFiles,
    ImagesFolder,
    Out,
    Prefix,
    Seed,
    TextsFolder,
    counts_of,
    finish,
    nearest_of,
)
from llava_fast.cli.endpoint import Asking, with_endpoint
from llava_fast.cli.options import Device
from llava_fast.errors import DataError


def chains(
    data: DataFiles,
    out: Out,
    related: Annotated[
        Literal["text", "image", "media"],
        typer.Option(
            help="Related by text, by how pictures look to --model, or by being about the same picture or video."
        ),
    ] = "text",
    context: Annotated[int, typer.Option(min=1, help="Most related samples before each.")] = 3,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose tower compares pictures.")] = None,
    images: ImagesFolder = Path(),
    device: Device = None,
) -> None:
    """Samples in the context of related ones: several pictures, each with its question, as in MIMIC-IT.

    \b
    llava-fast make-data chains instruct.json -o chains.json
    llava-fast make-data chains instruct.json --related image -m MODEL --images coco/ -o chains.json
    llava-fast make-data chains videos.json --related media -o chains.json
    """
    from llava_fast.datagen import chains as making
    from llava_fast.datagen.output import Report, check_output
    from llava_fast.datagen.samples import read_given

    check_output(out)
    report = Report()
    samples = making.usable(read_given(data), related, report)
    if related == "media":
        near = making.same_media(samples, context)
    else:
        media = [each.media for each in samples]
        near = nearest_of(related, [each.text for each in samples], media, context, model, images, device)
    finish(out, making.chains(samples, near, report), report)


def core_set(
    data: DataFiles,
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="How many samples to keep. SVIT's has 157,712.")] = 150_000,
    cap: Annotated[
        list[str], typer.Option(help="Most samples of the files whose path holds a word, as gqa=72000; repeatable.")
    ] = [],  # noqa: B006
    least: Annotated[int, typer.Option(min=1, help="Words that fewer samples have are dropped from the list.")] = 10,
    balance: Annotated[bool, typer.Option(help="As many answers that begin with yes as with no.")] = True,
    texts: TextsFolder = None,
    seed: Seed = 0,
) -> None:
    """The most informative samples of much data, in the manner of SVIT's core set.

    \b
    llava-fast make-data core-set svit.json 'more/*.json' --cap gqa=72000 -o core.json

    A sample is the more informative the more words of a concept list it has (concepts.yaml among the texts; SVIT's own
    list and scoring were never published). Yes and no are balanced.
    """
    from llava_fast.datagen import core_set as making
    from llava_fast.datagen.output import Report, check_output
    from llava_fast.datagen.samples import read_given
    from llava_fast.datagen.wording import Concepts, Texts

    check_output(out)
    concepts = Texts(texts).read("concepts", Concepts).concepts
    caps = counts_of(cap, "--cap", "a source and a number, as gqa=72000")
    samples, report = read_given(data), Report()
    numbers = making.choose(samples, concepts, count, report, least, caps, balance, seed)
    finish(out, (samples[number].value for number in numbers), report)


@with_endpoint
def preferences(
    asking: Asking,
    data: DataFiles,
    out: Out,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Draws the answers: a checkpoint directory or Hub id.")
    ] = None,
    answer_endpoint: Annotated[
        str | None, typer.Option(help="Draws the answers, in place of --model: the base URL of an endpoint.")
    ] = None,
    answer_model: Annotated[str | None, typer.Option(help="The model's name at --answer-endpoint.")] = None,
    answer_key_env: Annotated[
        str, typer.Option(help="The environment variable with the key of --answer-endpoint.")
    ] = "ANSWER_API_KEY",
    answers: Annotated[int, typer.Option(min=2, help="Answers drawn for a question.")] = 6,
    temperature: Annotated[float, typer.Option(min=0.01, help="At which they are drawn.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; longer ones are left out.")] = 256,
    score: Annotated[
        str,
        typer.Option(
            help="endpoint; reference (the data's own answer is right, others wrong); or your module:function."
        ),
    ] = "endpoint",
    records: Annotated[
        list[str], typer.Option(help="Records of the same pictures, whose captions are evidence; repeatable.")
    ] = [],  # noqa: B006
    coco_captions: CocoCaptions = [],  # noqa: B006
    coco_instances: CocoInstances = [],  # noqa: B006
    prefix: Prefix = "",
    with_reference: Annotated[
        bool, typer.Option("--with-reference", help="Prefer the data's own answer where none that was drawn is good.")
    ] = False,
    images: ImagesFolder = Path(),
    count: Annotated[int | None, typer.Option(min=1, help="Ask only about so many samples, drawn by the seed.")] = None,
    device: Device = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes with --model each: one a GPU, or a share of the cores each.")
    ] = 1,
    ray: Annotated[
        int,
        typer.Option(
            min=0, help="Actors of a Ray cluster with --model each (RAY_ADDRESS, or this machine's). 0: no Ray."
        ),
    ] = 0,
    texts: TextsFolder = None,
    seed: Seed = 0,
) -> None:
    """Preference pairs for `llava-fast dpo`: several answers of the model, scored with captions as evidence.

    \b
    llava-fast make-data preferences data.json --images coco/ -m runs/mine/model \\
        --coco-captions captions_train2017.json --prefix train2017/ -o pairs.jsonl
    llava-fast make-data preferences data.json -m MODEL --score reference -o pairs.jsonl

    The first question of each sample is asked. An answer of a good score is paired with one of a bad score (score.yaml
    among the texts says from which on); questions whose answers are all good or all bad give no pair. Answers that
    were drawn are kept beside the output, so a killed run goes on.
    """
    import random

    from llava_fast.datagen import preferences as making
    from llava_fast.datagen.output import Report, check_output
    from llava_fast.datagen.records import read_coco, read_records
    from llava_fast.datagen.samples import read_given
    from llava_fast.datagen.wording import Judging, Texts
    from llava_fast.evaluate import workers
    from llava_fast.evaluate.model import ModelSpec
    from llava_fast.storage.journal import Journal

    check_output(out)
    if (model is None) == (answer_endpoint is None) or (answer_endpoint is None) != (answer_model is None):
        raise DataError("give either --model, or --answer-endpoint and --answer-model, to draw the answers")
    if ray and processes > 1:
        raise DataError("--ray and --processes exclude each other")
    if asking.dry_run and score != making.ENDPOINT:
        raise DataError(f"--dry-run shows a prompt, and --score {score} asks none")
    judging, report = Texts(texts).read("score", Judging), Report()
    samples = read_given(data)
    if count is not None and count < len(samples):
        samples = [samples[each] for each in sorted(random.Random(seed).sample(range(len(samples)), count))]
    known = read_records(records) + (read_coco(coco_captions, coco_instances, prefix) if coco_captions else [])
    asked = making.questions(samples, known, images, report)
    drawing = making.Drawing(answers, temperature, max_tokens, seed)
    if asking.dry_run and model is not None:
        drawn = [[each.reference] for each in asked]
    elif model is not None:
        spec = ModelSpec(model, device)
        answer = workers.on_ray(spec, ray) if ray else workers.in_this_process(spec)
        if processes > 1:
            answer = workers.in_processes(spec, processes)
        with Journal(out.with_name(f"{out.name}.answers.jsonl")) as journal:
            drawn = making.draw_by_engine(answer, str(spec.identity()), asked, drawing, journal, report)
    elif answer_endpoint is not None and answer_model is not None:
        with asking.at(answer_endpoint, answer_model, answer_key_env).opened(
            out.with_name(f"{out.name}.answers")
        ) as ask:
            drawn = making.draw_by_endpoint(ask, asked, drawing, report)
    if score == making.ENDPOINT:
        with asking.opened(out) as ask:
            scored, good = making.score_by_endpoint(ask, asked, drawn, judging, report), judging.good
    else:
        scored, good = making.score_by_rule(score, asked, drawn), 0.5
    finish(out, making.pairs(asked, scored, good, report, seed, with_reference), report)
