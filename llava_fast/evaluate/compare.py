"""Comparison of two evaluations of the same questions, with confidence intervals."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.bootstrap import RESAMPLES, middle, resampled
from llava_fast.evaluate.lmms import PREFIX, SampleScores
from llava_fast.evaluate.results import load_results, scored_of
from llava_fast.evaluate.tasks import task_of


@dataclass(frozen=True)
class Difference:
    """A metric of two evaluations. low, high: the 95% interval of B - A over resampled clusters. better: the share of
    resamples in which B is above A (ties count half).
    """

    task: str
    metric: str
    a: float
    b: float
    low: float
    high: float
    better: float
    units: int


def compare(first: Path, second: Path, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """Compare the metrics of all common tasks on the questions with scores in both. Intervals are from a paired
    bootstrap: the same clusters (all questions about an image) are drawn with replacement for both.

    Raises EvaluationError if nothing is common or if questions with the same id differ.
    """
    a, b = load_results(first), load_results(second)
    shared = [name for name in a["tasks"] if name in b["tasks"]]
    if not shared:
        raise EvaluationError(f"{first} and {second} have no task in common: {list(a['tasks'])} and {list(b['tasks'])}")
    found = []
    for name in shared:
        found += differences(name, a["tasks"][name], b["tasks"][name], resamples, seed)
    if not found:
        raise EvaluationError(
            f"no task of {first} and {second} ({', '.join(shared)}) has scores for the same questions"
        )
    return found


def differences(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """Return a Difference for each metric of one task, or [] if no question has a score in both."""
    task = SampleScores() if name.startswith(PREFIX) else task_of(name)
    rows = {row["id"]: row for row in b["answers"] if row["score"] is not None}
    pairs = [(row, rows[row["id"]]) for row in a["answers"] if row["score"] is not None and row["id"] in rows]
    for mine, theirs in pairs:
        if (mine["prompt"], mine["reference"]) != (theirs["prompt"], theirs["reference"]):
            raise EvaluationError(f"{name}: question {mine['id']!r} is not the same in both: their data differ")
    if not pairs:
        return []
    left, right = (task.units([scored_of(row, "") for row in side]) for side in zip(*pairs, strict=True))
    assert left is not None
    assert right is not None
    ones = np.ones(len(left.names))
    at = task.overall(left, ones), task.overall(right, ones)
    mine, theirs = (
        resampled(functools.partial(task.overall, side), side.cluster, resamples, seed) for side in (left, right)
    )
    found = []
    for metric in at[0]:
        if metric not in at[1]:  # only one of the two was judged
            continue
        gaps = theirs[metric] - mine[metric]
        gaps = gaps[~np.isnan(gaps)]
        better = float(np.mean(gaps > 0) + np.mean(gaps == 0) / 2) if len(gaps) else float("nan")
        values = at[0][metric], at[1][metric]
        found.append(Difference(name, metric, *values, *middle(gaps), better, len(left.names)))
    return found
