"""results.json: the metrics and all answers of an evaluation."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.bootstrap import Measure, middle, resampled
from llava_fast.evaluate.task import Answer, Question, Scored, Task, is_uri, relative
from llava_fast.storage.files import file_written_whole
from llava_fast.version import __version__

RESULTS = "results.json"


def save(out: Path, model: Mapping[str, Any], settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tasks' results into OUT/results.json, which must be of the same model, and return its content."""
    results: dict[str, Any] = {"llava_fast": __version__, "model": dict(model), "settings": dict(settings)}
    make_folder(out)
    with FileLock(out / f".{RESULTS}.lock"):  # an evaluation and a judge may end at the same time
        results["tasks"] = {**results_before(out, model), **found}
        write_json(out / RESULTS, results)
    return results


def make_folder(path: Path) -> None:
    """Make a folder where it is missing. Raises EvaluationError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be made a folder ({error.strerror}): give another path") from None


def results_before(out: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """Read the tasks' results in OUT. Raises EvaluationError if they are of another model."""
    if not (out / RESULTS).exists():
        return {}
    before = load_results(out)
    there = before["model"]
    if names := [name for name in {**there, **model} if there.get(name) != model.get(name)]:
        told = ", ".join(f"{name} is {there.get(name)!r} there and {model.get(name)!r} now" for name in names)
        raise EvaluationError(f"{out / RESULTS} is of another model ({told}): give another --out")
    return before["tasks"]


def failures_of(results: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """A sentence for each of these tasks with questions that got no answer. They count as wrong; those without a score
    (a judge gives it, or the data has no reference) are left out of the metrics."""
    told = []
    for name in tasks:
        found = results["tasks"][name]
        failed = [row for row in found.get("answers", ()) if row.get("error") is not None]
        if failed:
            counts = "count as wrong"
            if left_out := sum(row["score"] is None for row in failed):
                counts = "are left out" if left_out == len(failed) else f"{counts}, save {left_out} that are left out"
            told.append(
                f"{name}: {len(failed)} of {found['questions']} questions got no answer and {counts}; the first, "
                f"{failed[0]['id']!r}: {failed[0]['error']}. The same command asks them again"
            )
    return told


def result_of(task: Task, scored: Sequence[Scored], folder: Path) -> dict[str, Any]:
    """Return a task's part of results.json: metrics, their 95% intervals, metrics per category, and all answers."""
    units = task.units(scored)
    metrics: dict[str, float | None] = {}
    intervals: dict[str, list[float | None]] = {}
    categories: dict[str, dict[str, float | None]] = {}
    category_intervals: dict[str, dict[str, list[float | None]]] = {}
    counts: dict[str, int] = {}
    if units is not None:
        weights = np.ones(len(units.names))
        metrics = _plain(task.overall(units, weights))
        intervals = _intervals(functools.partial(task.overall, units), units.cluster)
        for name, chosen in units.by_category.items():
            measure = functools.partial(task.metrics, units.of(chosen))
            categories[name] = _plain(measure(weights[chosen]))
            counts[name] = int(chosen.sum())
            if task.judged:  # few questions
                category_intervals[name] = _intervals(measure, units.cluster[chosen])
    return {
        "title": task.title,
        "main": task.main,
        "unit": task.unit,
        "judged": task.judged,
        "metrics": metrics,
        "intervals": intervals,
        "categories": categories,
        "category_intervals": category_intervals,
        "category_units": counts,
        "questions": len(scored),
        "units": 0 if units is None else len(units.names),
        "unreadable": sum(each.read is None and each.answer.error is None for each in scored),
        "errors": sum(each.answer.error is not None for each in scored),
        "cut_off": sum(each.answer.finish == "length" for each in scored),
        "scorer": task.scorer,
        "source": task.source,
        "folder": str(folder.resolve()),
        "answers": [_row(each, folder) for each in scored],
    }


def _intervals(measure: Measure, cluster: np.ndarray) -> dict[str, list[float | None]]:
    drawn = resampled(measure, cluster, 1000)
    return {name: [defined(bound) for bound in middle(values)] for name, values in drawn.items()}


def _row(scored: Scored, folder: Path) -> dict[str, Any]:
    question, answer = scored.question, scored.answer
    row = {
        "id": question.id,
        "question": question.text,
        "prompt": question.prompt,
        "images": [relative(image, folder) for image in question.images if isinstance(image, str)],
        "reference": question.reference,
        "answer": answer.text,
        "read": scored.read,
        "score": scored.score,
        "categories": list(question.categories),
        "tokens": answer.tokens,
        "finish": answer.finish,
    }
    row |= {name: value for name in ("unit", "cluster") if (value := getattr(question, name))}
    if question.facts:
        row["facts"] = dict(question.facts)
    if answer.error is not None:
        row["error"] = answer.error
    if scored.marks:
        row["marks"] = dict(scored.marks)
    return row


GRADED = ("question", "prompt", "images", "reference", "answer", "read", "error", "facts")
"""The fields of a row on which a judge's grades depend."""


def with_grades(
    task: Task, scored: Sequence[Scored], folder: Path, before: Mapping[str, Any]
) -> tuple[list[Scored], dict[int, list[str]]]:
    """Return the answers with the judge's scores and marks of an earlier result of the task, where question and answer
    are the same, and the judge's replies by the number of the answer.
    """
    rows = {row["id"]: row for row in before["answers"] if "review" in row}
    found, reviews = list(scored), {}
    for number, each in enumerate(scored):
        earlier, row = rows.get(each.question.id), _row(each, folder)
        if earlier is None or any(json.dumps(row.get(name)) != json.dumps(earlier.get(name)) for name in GRADED):
            continue
        score = earlier["score"] if task.judged else each.score
        found[number] = dataclasses.replace(each, score=score, marks=earlier.get("marks", {}))
        reviews[number] = earlier["review"]
    return found, reviews


def add_reviews(result: dict[str, Any], reviews: Mapping[int, list[str]], judge: Mapping[str, Any]) -> None:
    """Add to a result the judge's replies, by the number of the answer, and what is known of the judge."""
    for number, review in reviews.items():
        result["answers"][number]["review"] = review
    result["judge"] = {**judge, "without_score": sum(row["score"] is None for row in result["answers"])}


def load_results(out: Path) -> dict[str, Any]:
    """Read the results of a folder or of a results.json. Raises EvaluationError."""
    path = out / RESULTS if out.is_dir() else out
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read ({error.strerror}): run llava-fast eval --out {out} first"
        ) from None
    except ValueError as error:
        raise EvaluationError(f"{path} is no JSON ({error}): run llava-fast eval again") from None
    if not isinstance(found, dict) or not {"model", "tasks"} <= found.keys():
        raise EvaluationError(f"{path} is no results.json of llava-fast eval")
    return found


def defined(value: float) -> float | None:
    """Convert NaN (an undefined metric) and infinity to None, since JSON has neither."""
    return float(value) if math.isfinite(value) else None


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: defined(value) for name, value in metrics.items()}


def write_json(path: Path, content: Any) -> None:
    """Write the file atomically."""
    make_folder(path.parent)
    with file_written_whole(path) as new:
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def scored_of(row: Mapping[str, Any], folder: str) -> Scored:
    """Convert a row of results.json back to Scored. `folder` is the task's data folder."""
    question = Question(
        row["id"],
        row["question"],
        row["prompt"],
        tuple(image if is_uri(image) else os.path.join(folder, image) for image in row["images"]),
        row["reference"],
        tuple(row["categories"]),
        row.get("unit", ""),
        row.get("cluster", ""),
        row.get("facts", {}),
    )
    answer = Answer(row["answer"], row["tokens"], finish=row["finish"], error=row.get("error"))
    return Scored(question, answer, row["read"], row["score"], row.get("marks", {}))


def lines_of(results: Mapping[str, Any], tasks: Iterable[str]) -> list[tuple[str, ...]]:
    """Return rows (task, metric, value, 95% interval, number of questions) for a table."""
    found: list[tuple[str, ...]] = []
    for name in tasks:
        task = results["tasks"][name]
        if not task["metrics"]:
            why = "by llava-fast judge" if task["judged"] else "no references"
            found.append((name, task["main"], why, "", str(task["questions"])))
        for number, (metric, value) in enumerate(task["metrics"].items()):
            shown = "undefined" if value is None else f"{value:.2f}"
            bounds = task["intervals"].get(metric, [None])
            between = "" if None in bounds else " to ".join(f"{bound:.2f}" for bound in bounds)
            names = (name, str(task["questions"])) if not number else ("", "")
            found.append((names[0], metric, shown, between, names[1]))
    return found
