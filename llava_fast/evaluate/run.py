"""An evaluation: questions, answers that are kept as they come, scores, one JSON with all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.pictures import thumbnails
from llava_fast.evaluate.records import Records, file_name, key_of
from llava_fast.evaluate.report import shown
from llava_fast.evaluate.results import (
    add_reviews,
    make_folder,
    result_of,
    results_before,
    save,
    with_grades,
    write_json,
)
from llava_fast.evaluate.task import Question, Scored, Task, is_uri
from llava_fast.evaluate.tasks import TASKS, task_of

if TYPE_CHECKING:
    from llava_fast.evaluate.workers import Answerer

Watch = Callable[[str, int, int], None]
"""Told (task, answered, of how many) as answers come."""


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    data      the folder of the tasks' files: each in its own folder below it, or here.
    limit     at most so many questions of a task (whole units: all passes of a circular question), the same ones for
              every model, and those of a smaller limit among them. None: all.
    max_new_tokens  of an answer; None leaves it to the task. Answers are greedy, as in the papers.
    choose    how an option of a question is chosen: "answer", the model generates it; "likelihood", the candidate with
              the largest sum of log-probabilities; "mean_likelihood", the largest mean.
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
    choose: Literal["answer", "likelihood", "mean_likelihood"] = "answer"


def run(plan: Plan, answerer: Answerer, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """Answer what is not answered yet, score, and write OUT/results.json; returns its content. With a shard, nothing is
    scored and {} is returned. Raises EvaluationError.
    """
    before = results_before(plan.out, plan.model)
    prepared = [_prepared(name, plan) for name in plan.tasks]  # what is missing is said before a model is loaded
    make_folder(plan.out)
    found: dict[str, Any] = {}
    for name, task, folder, questions in prepared:
        scored = _answered(name, task, folder, questions, plan, answerer, watch)
        if plan.shard is None:
            graded, reviews = with_grades(task, scored, folder, before[name]) if name in before else (scored, {})
            found[name] = result_of(task, graded, folder)
            if reviews:
                add_reviews(found[name], reviews, before[name]["judge"])
            if plan.pictures:
                for number in shown(len(scored)):
                    pictures = thumbnails(scored[number].question.images, plan.out)
                    found[name]["answers"][number]["pictures"] = pictures
            if (submission := task.submission(scored)) is not None:
                write_json(plan.out / f"{file_name(name)}.submission.json", submission)
    if plan.shard is not None:
        return {}
    settings: dict[str, Any] = {"max_new_tokens": plan.max_new_tokens, "limit": plan.limit}
    if plan.choose != "answer":
        settings["choose"] = plan.choose
    return save(plan.out, plan.model, settings, found)


def _prepared(name: str, plan: Plan) -> tuple[str, Task, Path, list[Question]]:
    task = task_of(name)
    folder = plan.data / task.folder if task.folder and (plan.data / task.folder).is_dir() else plan.data
    questions = limited(task.questions(folder), plan.limit)
    if plan.choose != "answer":
        questions = [_ranked(task, name, question) for question in questions]
    if not questions:
        raise EvaluationError(f"{name} has no questions in {folder}")
    known: set[str] = set()
    for question in questions:
        if question.id in known:
            raise EvaluationError(f"{name}: two questions have the id {question.id!r}")
        known.add(question.id)
        for image in question.images:
            if isinstance(image, str) and not is_uri(image) and not os.path.isfile(image):
                raise EvaluationError(f"{name}: question {question.id!r} needs the picture {image}, which is not there")
    return name, task, folder, questions


def _ranked(task: Task, name: str, question: Question) -> Question:
    found = task.with_candidates(question)
    if found is None:
        able = [each for each in TASKS if TASKS[each].with_candidates is not Task.with_candidates]
        raise EvaluationError(
            f"{name} has no options whose likelihoods could be compared; --choose is for {', '.join(able)}"
        )
    return found


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
    options: dict[str, Any] = {"max_new_tokens": plan.max_new_tokens or task.max_new_tokens}
    if plan.choose != "answer":
        options = {"choose": plan.choose}
    settings = {"model": dict(plan.model), **options}
    keys = {question.id: key_of(question, folder) for question in questions}
    with Records(plan.out / "answers", name, settings, plan.shard) as records:
        if plan.fresh:
            records.clear()
        answers = {} if plan.fresh else records.read(keys)
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
