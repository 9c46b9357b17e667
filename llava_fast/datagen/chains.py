"""Samples in the context of related ones, as MIMIC-IT (arXiv 2306.05425): questions about related pictures, answered,
come before a question about another; or further questions about the same video or picture.

MIMIC-IT relates LLaVA's samples by their texts or their pictures, and a video's instructions to one another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from llava_fast.datagen.output import Report, turns
from llava_fast.datagen.records import Record
from llava_fast.datagen.samples import Given


def usable(samples: Sequence[Given], related: str, report: Report) -> list[Given]:
    """Samples that a chain can be made of: with media; of one picture, unless the same media relate them."""
    kept = []
    for sample in samples:
        if not sample.media:
            report.left_out["no picture or video"] += 1
        elif related != "media" and sample.video:
            report.left_out["a video, of which a sample holds one: use --related media"] += 1
        elif related != "media" and len(sample.images) != 1:
            report.left_out["several pictures"] += 1
        else:
            kept.append(sample)
    return kept


def same_media(samples: Sequence[Given], count: int) -> list[list[int]]:
    """For each sample up to `count` others about the same media: those that follow it in the data, and then from the
    first on, so that chains differ."""
    by_media: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        by_media[sample.media].append(number)
    near: list[list[int]] = [[] for _ in samples]
    for numbers in by_media.values():
        for at, number in enumerate(numbers):
            near[number] = [*numbers[at + 1 :], *numbers[:at]][:count]
    return near


def chains(samples: Sequence[Given], near: Sequence[Sequence[int]], report: Report) -> Iterator[dict[str, Any]]:
    """A sample for each that has related ones. Over several pictures, the first turns of the related samples come
    first, the most alike last, each after its own <image>. Over the same media, it is one conversation."""
    for number, (sample, others) in enumerate(zip(samples, near, strict=True)):
        if not others:
            report.left_out["nothing related"] += 1
            continue
        shown = [samples[other] for other in reversed(others)]
        report.made[f"{len(shown)} in context"] += 1
        name = f"{sample.name or number}-chain"
        if all(other.media == sample.media for other in shown):
            yield {"id": name, **_media(sample), "conversations": turns(_one_media(sample, shown))}
            continue
        first, *more = sample.pairs
        asked = [_marked(other.pairs[0]) for other in shown] + [_marked(first), *more]
        images = [image for each in (*shown, sample) for image in each.images]
        yield {"id": name, "image": images, "conversations": turns(asked)}


def _marked(pair: tuple[str, str]) -> tuple[str, str]:
    return f"<image>\n{pair[0]}", pair[1]


def _media(sample: Given) -> dict[str, Any]:
    return {key: sample.value[key] for key in ("image", "video") if sample.value.get(key)}


def _one_media(sample: Given, shown: Sequence[Given]) -> list[tuple[str, str]]:
    """Related turns, then the sample's own, each question once; the placeholder stands before the first."""
    pairs = dict(pair for other in shown for pair in other.pairs)
    own = dict(sample.pairs)
    (question, answer), *more = [*((q, a) for q, a in pairs.items() if q not in own), *sample.pairs]
    placeholders = "<video>" if sample.video else "\n".join(["<image>"] * len(sample.images))
    return [(f"{placeholders}\n{question}", answer), *more]


class TwoPictures(Record):
    """Two records of which a language model is told together."""

    told: str = ""

    def context(self) -> str:
        return self.told


def two_pictures(records: Sequence[Record], near: Sequence[Sequence[int]]) -> list[Record]:
    """A record for each pair of related ones, each pair once."""
    pairs = dict.fromkeys(tuple(sorted((number, other))) for number, others in enumerate(near) for other in others)
    made: list[Record] = []
    for first, second in pairs:
        one, two = records[first], records[second]
        if isinstance(one.image, str) and isinstance(two.image, str):
            told = f"First picture\n{one.context()}\n\nSecond picture\n{two.context()}"
            made.append(TwoPictures(id=f"{one.id}-{two.id}", image=[one.image, two.image], told=told))
    return made
