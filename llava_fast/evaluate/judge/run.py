"""Judging of the answers of an evaluation. Scores are written to results.json, and all replies are stored next to
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llava_fast.endpoint import Ask
from llava_fast.errors import EvaluationError
from llava_fast.evaluate.judge.judges import JUDGED, Judging, judge
from llava_fast.evaluate.records import file_name
from llava_fast.evaluate.results import add_reviews, load_results, result_of, save, scored_of
from llava_fast.evaluate.tasks import task_of

Open = Callable[[Path], AbstractContextManager[Ask]]
"""A function from the file for a task's replies to a context manager of `Ask`."""


def tasks_to_judge(results: dict[str, Any], wanted: Sequence[str]) -> list[str]:
    """Return the tasks to judge: the named ones, or all judged tasks in results.json except ScienceQA, whose accuracy
    needs no judge. Raises EvaluationError for a task without answers or without a judge, and if there is no task.
    """
    answered = ", ".join(results["tasks"])
    for name in wanted:
        if name not in results["tasks"]:
            raise EvaluationError(f"{name} is not answered (these are: {answered}): run llava-fast eval first")
        if name.partition(":")[0] not in JUDGED:
            raise EvaluationError(f"no judge scores {name}: {', '.join(JUDGED)} have one")
    found = list(wanted) or [name for name, task in results["tasks"].items() if task["judged"]]
    if not found:
        raise EvaluationError(f"none of {answered} waits for a judge (scienceqa is judged if it is named)")
    return found


def judge_tasks(out: Path, wanted: Sequence[str], judging: Judging, opened: Open, judge_name: str) -> dict[str, Any]:
    """Judge tasks of OUT/results.json, write their scores there and return its content. Raises EvaluationError."""
    results = load_results(out)
    for name in tasks_to_judge(results, wanted):
        old = results["tasks"][name]
        scored = [scored_of(row, old["folder"]) for row in old["answers"]]
        with opened(out / "judge" / file_name(name)) as ask:
            judged = judge(name, scored, Path(old["folder"]), judging, ask)
        new = result_of(task_of(name), judged.scored, Path(old["folder"]))
        for before, row in zip(old["answers"], new["answers"], strict=True):
            if "pictures" in before:
                row["pictures"] = before["pictures"]
        known = {"model": judge_name, **judging.settings(), **dataclasses.asdict(judged.counts)}
        add_reviews(new, dict(enumerate(judged.reviews)), known)
        results = save(out, results["model"], results.get("settings", {}), {name: new})
    return results
