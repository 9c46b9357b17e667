"""An evaluation: questions, answers that are kept as they come, scores, one JSON with all of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.pictures import thumbnails
from llava_fast.evaluate.records import Records, file_name, key_of
from llava_fast.evaluate.task import Question, Scored, Task
from llava_fast.evaluate.tasks import task_of
from llava_fast.version import __version__

if TYPE_CHECKING:
    from llava_fast.evaluate.workers import Answerer

RESULTS = "results.json"
Watch = Callable[[str, int, int], None]
"""Told (task, answered, of how many) as answers come."""


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    data      the folder of the tasks' files: each in its own folder below it, or here.
    limit     at most so many questions of a task (whole units: all passes of a circular question), the same ones for
              every model, and those of a smaller limit among them. None: all.
    max_new_tokens  of an answer; None leaves it to the task. Answers are greedy, as in the papers.
    shard     (number, of how many): answer this share only, and score nothing.
    fresh     forget the answers that OUT holds.
    pictures  keep a small copy of each picture, for the report.
    """

    tasks: tuple[str, ...]
    data: Path
    out: Path
    model: Mapping[str, Any]
    limit: int | None = None
    max_new_tokens: int | None = None
    shard: tuple[int, int] | None = None
    fresh: bool = False
    pictures: bool = False


def run(plan: Plan, answerer: Answerer, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """Answer what is not answered yet, score, and write OUT/results.json; returns its content. With a shard, nothing is
    scored and {} is returned. Raises EvaluationError.
    """
    prepared = [_prepared(name, plan) for name in plan.tasks]  # what is missing is said before a model is loaded
    found: dict[str, Any] = {}
    for name, task, folder, questions in prepared:
        scored = _answered(name, task, folder, questions, plan, answerer, watch)
        if plan.shard is None:
            found[name] = result_of(task, scored, folder)
            if plan.pictures:
                for row, each in zip(found[name]["answers"], scored, strict=True):
                    row["pictures"] = thumbnails(each.question.images, plan.out)
            if (submission := task.submission(scored)) is not None:
                _write(plan.out / f"{file_name(name)}.submission.json", submission)
    if plan.shard is not None:
        return {}
    return save(plan.out, plan.model, {"max_new_tokens": plan.max_new_tokens, "limit": plan.limit}, found)


def save(out: Path, model: Mapping[str, Any], settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Put tasks' results into OUT/results.json beside those of the same model that it holds; returns its content."""
    results: dict[str, Any] = {"llava_fast": __version__, "model": dict(model), "settings": dict(settings), "tasks": {}}
    if (out / RESULTS).exists():
        before = load_results(out)
        if before["model"] != results["model"]:
            raise EvaluationError(f"{out / RESULTS} is of another model ({before['model']}): give another --out")
        results["tasks"] = before["tasks"]
    results["tasks"].update(found)
    _write(out / RESULTS, results)
    return results


def _prepared(name: str, plan: Plan) -> tuple[str, Task, Path, list[Question]]:
    task = task_of(name)
    folder = plan.data / task.folder if task.folder and (plan.data / task.folder).is_dir() else plan.data
    questions = limited(task.questions(folder), plan.limit)
    if not questions:
        raise EvaluationError(f"{name} has no questions in {folder}")
    known: set[str] = set()
    for question in questions:
        if question.id in known:
            raise EvaluationError(f"{name}: two questions have the id {question.id!r}")
        known.add(question.id)
        for image in question.images:
            if isinstance(image, str) and not image.startswith("data:") and not os.path.isfile(image):
                raise EvaluationError(f"{name}: question {question.id!r} needs the picture {image}, which is not there")
    return name, task, folder, questions


def limited(questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions, in order: units with the smallest hashes of their names, so that a smaller limit's
    questions are among a larger one's, and every part of a sorted file has its share.
    """
    if limit is None or len(questions) <= limit:
        return questions
    sizes: dict[str, int] = {}
    for question in questions:
        unit = question.unit or question.id
        sizes[unit] = sizes.get(unit, 0) + 1
    kept, left = set(), limit
    for unit in sorted(sizes, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        if sizes[unit] > left:
            break
        kept.add(unit)
        left -= sizes[unit]
    if not kept:
        raise EvaluationError(f"a limit of {limit} questions is below one unit of {max(sizes.values())}: raise it")
    return [question for question in questions if (question.unit or question.id) in kept]


def _answered(
    name: str, task: Task, folder: Path, questions: list[Question], plan: Plan, answerer: Answerer, watch: Watch
) -> list[Scored]:
    options = {"max_new_tokens": plan.max_new_tokens or task.max_new_tokens}
    settings = {"model": dict(plan.model), **options}
    keys = {question.id: key_of(question, folder) for question in questions}
    with Records(plan.out / "answers", name, settings, plan.shard) as records:
        if plan.fresh:
            records.clear()
        answers = records.read(keys)
        mine = questions
        if plan.shard is not None:
            number, count = plan.shard
            mine = questions[number::count]
        left = [question for question in mine if question.id not in answers]
        done = len(mine) - len(left)
        watch(name, done, len(mine))
        for question, answer in answerer(left, options) if left else ():
            records.append(question, keys[question.id], answer)
            answers[question.id] = answer
            done += 1
            watch(name, done, len(mine))
    return [] if plan.shard is not None else task.scored(questions, answers)


def result_of(task: Task, scored: Sequence[Scored], folder: Path) -> dict[str, Any]:
    """A task's part of results.json: metrics, metrics of each category, and every answer."""
    units = task.units(scored)
    metrics: dict[str, float | None] = {}
    categories: dict[str, dict[str, float | None]] = {}
    counts: dict[str, int] = {}
    if units is not None:
        weights = np.ones(len(units.names))
        metrics = _plain(task.overall(units, weights))
        for name, chosen in units.by_category.items():
            categories[name] = _plain(task.metrics(units.of(chosen), weights[chosen]))
            counts[name] = int(chosen.sum())
    return {
        "title": task.title,
        "main": task.main,
        "unit": task.unit,
        "judged": task.judged,
        "metrics": metrics,
        "categories": categories,
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


def _row(scored: Scored, folder: Path) -> dict[str, Any]:
    question, answer = scored.question, scored.answer
    row = {
        "id": question.id,
        "question": question.text,
        "prompt": question.prompt,
        "images": [os.path.relpath(image, folder) for image in question.images if isinstance(image, str)],
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
    return row


def load_results(out: Path) -> dict[str, Any]:
    """The results in a folder, or of a results.json. Raises EvaluationError."""
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


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: an undefined metric is null."""
    return {name: None if math.isnan(value) else float(value) for name, value in metrics.items()}


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)


def lines_of(results: Mapping[str, Any], tasks: Iterable[str]) -> list[tuple[str, str, str, str]]:
    """(task, metric, value, questions) for a table of what was measured."""
    found = []
    for name in tasks:
        task = results["tasks"][name]
        if not task["metrics"]:
            why = "by llava-fast judge" if task["judged"] else "no references"
            found.append((name, task["main"], why, str(task["questions"])))
        for number, (metric, value) in enumerate(task["metrics"].items()):
            shown = "undefined" if value is None else f"{value:.2f}"
            found.append((name if not number else "", metric, shown, str(task["questions"]) if not number else ""))
    return found
