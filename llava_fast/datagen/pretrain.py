"""Selection of image-text pairs with even coverage of concepts, as for LLaVA's 595K subset of CC3M (arXiv 2304.08485,
"Pre-training dataset"). Noun phrases that occur in fewer than 3 captions are skipped. In ascending order of frequency,
each other phrase adds its captions to the pool, or 100 random ones if there are more."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llava_fast.datagen.output import Report, turns
from llava_fast.datagen.records import Record
from llava_fast.datagen.wording import Questions
from llava_fast.errors import DataError

LEAST, MOST = 3, 100


def choose(phrases: Iterable[Sequence[str]], least: int = LEAST, most: int = MOST, seed: int = 0) -> list[int]:
    """Return the sorted indices of the selected captions. `phrases` are each caption's distinct noun phrases."""
    captions: dict[str, list[int]] = defaultdict(list)
    for number, found in enumerate(phrases):
        for phrase in found:
            captions[phrase].append(number)
    chosen: set[int] = set()
    for phrase, numbers in sorted(captions.items(), key=lambda each: (len(each[1]), each[0])):
        if len(numbers) < least:
            continue
        chosen.update(numbers if len(numbers) <= most else random.Random(f"{seed} {phrase}").sample(numbers, most))
    return sorted(chosen)


def pairs(
    records: Sequence[Record], numbers: Sequence[int], questions: Questions, report: Report, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield samples of the selected records: a short instruction drawn by seed, and the first caption as the answer."""
    for number in numbers:
        record = records[number]
        draw = random.Random(f"{seed} {record.id}")
        question, mark = draw.choice(questions.questions), record.placeholders().strip("\n")
        asked = f"{mark}\n{question}" if draw.random() < 0.5 else f"{question}\n{mark}"
        report.made["pairs"] += 1
        yield {"id": record.id, **record.media(), "conversations": turns([(asked, record.captions[0].strip())])}


def usable(records: Sequence[Record], report: Report) -> list[Record]:
    """Return the records with an image and a caption. Others are counted by reason. Raises DataError if none is
    left."""
    kept = []
    for record in records:
        why = (
            "no picture"
            if not record.media()
            else ""
            if record.captions and record.captions[0].strip()
            else "no caption"
        )
        if why:
            report.left_out[why] += 1
        else:
            kept.append(record)
    if not kept:
        raise DataError("no record has a picture and a caption")
    return kept
