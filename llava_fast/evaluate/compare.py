"""Two evaluations of the same questions: what differs, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.bootstrap import RESAMPLES, middle, resampled
from llava_fast.evaluate.results import load_results, scored_of
from llava_fast.evaluate.tasks import task_of


@dataclass(frozen=True)
class Difference:
    """A metric of two evaluations. low, high: the middle 95% of B - A over resampled clusters; `better`: the share of
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
    """The metrics of the tasks that both have, on the questions that both have scores for; intervals by a paired
    bootstrap: clusters (pictures, with all that is asked about them) are drawn with replacement, the same for both.

    Raises EvaluationError where nothing is shared, or where questions of the same id differ.
    """
    a, b = load_results(first), load_results(second)
    shared = [name for name in a["tasks"] if name in b["tasks"]]
    if not shared:
        raise EvaluationError(f"{first} and {second} have no task in common: {list(a['tasks'])} and {list(b['tasks'])}")
    found = []
    for name in shared:
        if name.startswith("lmms:"):
            continue
        found += differences(name, a["tasks"][name], b["tasks"][name], resamples, seed)
    if not found:
        raise EvaluationError(
            f"no task of {first} and {second} ({', '.join(shared)}) has scores for the same questions"
        )
    return found


def differences(
    name: str, a: Mapping[str, Any], b: Mapping[str, Any], resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """A Difference for each metric of one task; [] where no question has a score in both."""
    task = task_of(name)
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
    mine, theirs = (resampled(task, side, resamples, seed) for side in (left, right))
    found = []
    for metric in at[0]:
        if metric not in at[1]:  # a judge has seen one of the two
            continue
        gaps = theirs[metric] - mine[metric]
        gaps = gaps[~np.isnan(gaps)]
        better = float(np.mean(gaps > 0) + np.mean(gaps == 0) / 2) if len(gaps) else float("nan")
        values = at[0][metric], at[1][metric]
        found.append(Difference(name, metric, *values, *middle(gaps), better, len(left.names)))
    return found
