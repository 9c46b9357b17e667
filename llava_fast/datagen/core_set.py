"""A small informative part of much data, in the manner of SVIT's core set (arXiv 2307.04087).

SVIT counts how much a sample's text overlaps a list of concepts that benchmarks ask about, takes the most informative
samples and balances "yes" and "no". Its list, its exact scoring and its ratios were never published: the list here was
written for this project, and a sample's score is the number of distinct words of it that the sample has.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from llava_fast.datagen.output import Report
from llava_fast.datagen.samples import Given

IN_THE_MANNER_OF = "in the manner of SVIT's core set: its concept list and exact scoring were never published"


def choose(
    samples: Sequence[Given],
    concepts: Mapping[str, Sequence[str]],
    count: int,
    report: Report,
    least: int = 1,
    caps: Mapping[str, int] | None = None,
    balance: bool = True,
    seed: int = 0,
) -> list[int]:
    """The numbers of up to `count` samples, sorted.

    least    words that fewer samples have are dropped from the list.
    caps     most samples of a source (a part of its path); others have no cap.
    balance  as many answers "yes" as "no": the least informative samples of the larger side give way to the next ones.
    """
    pattern = _pattern(concepts)
    found = [{word.lower() for word in pattern.findall(sample.text)} for sample in samples]
    frequent = {word for word, times in Counter(word for words in found for word in words).items() if times >= least}
    scores = [len(words & frequent) for words in found]
    draw = random.Random(f"{seed} core set")
    order = sorted(range(len(samples)), key=lambda number: (-scores[number], draw.random()))
    allowed = _capped(order, samples, caps or {}, report)
    chosen, later = allowed[:count], allowed[count:]
    dropped = 0
    if balance:
        chosen, dropped = _balanced(chosen, later, [_lean(sample) for sample in samples], report)
    report.left_out["less informative"] += len(allowed) - len(chosen) - dropped
    report.made["core set"] += len(chosen)
    report.notes["mean score"] = f"{_mean([scores[each] for each in chosen]):.2f} of all {_mean(scores):.2f}"
    report.notes["manner"] = IN_THE_MANNER_OF
    return sorted(chosen)


def _pattern(concepts: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
    words = sorted({word for each in concepts.values() for word in each}, key=lambda word: (-len(word), word))
    return re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)


def _capped(order: Sequence[int], samples: Sequence[Given], caps: Mapping[str, int], report: Report) -> list[int]:
    """The order without samples beyond their source's cap. The first cap that names a part of the path counts."""
    taken: Counter[str] = Counter()
    kept = []
    for number in order:
        cap = next((each for each in caps if each in samples[number].source), None)
        if cap is not None and taken[cap] >= caps[cap]:
            report.left_out[f"beyond the cap of {cap}"] += 1
            continue
        if cap is not None:
            taken[cap] += 1
        kept.append(number)
    return kept


def _lean(sample: Given) -> int:
    """Answers that begin with "yes", less those that begin with "no"."""
    first = [re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE) for _, answer in sample.pairs]
    return sum(1 if found[1].lower() == "yes" else -1 for found in first if found)


def _balanced(
    chosen: Sequence[int], later: Sequence[int], leans: Sequence[int], report: Report
) -> tuple[list[int], int]:
    """Samples that lean to the larger side are dropped, the least informative first, and the next ones that do not lean
    to it take their places. Returns the samples, and how many were dropped, which are counted here."""
    excess, dropped = sum(leans[number] for number in chosen), set()
    for number in reversed(chosen):
        if excess * leans[number] > 0 and abs(leans[number]) <= abs(excess):
            dropped.add(number)
            excess -= leans[number]
            report.left_out["more yes than no" if leans[number] > 0 else "more no than yes"] += 1
    kept = [number for number in chosen if number not in dropped]
    for number in later:
        if len(kept) == len(chosen):
            break
        if abs(excess + leans[number]) <= abs(excess):
            kept.append(number)
            excess += leans[number]
    return kept, len(dropped)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0
