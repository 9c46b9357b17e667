"""The interface of an evaluation task: questions from published files, answer parsing, scores and metrics."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Columns = Mapping[str, np.ndarray]
"""Name -> float64 [units]."""


@dataclass(frozen=True)
class Question:
    """A question to a model.

    id          unique in its task.
    text        the question as shown in reports. `prompt` is the complete text after the images.
    images      paths, data: URIs, the bytes of files, or uint8 arrays [H, W, 3].
    reference   the reference answer for the scorer, JSON. None: the data has none (a test split).
    categories  categories for which metrics are computed separately.
    unit        questions of one unit are scored together (passes of a circular question). Default: one question.
    cluster     units of a cluster are dependent, so intervals resample clusters. Default: by the first image.
    facts       further data for the scorer or a judge, JSON.
    history     earlier messages of a conversation, in OpenAI's format.
    placed      whether history and prompt contain `<image>` at the images' positions. Otherwise images come first.
    candidates  (answer, text) pairs: the answer whose text is likeliest is given. Empty: the answer is generated.
    """

    id: str
    text: str
    prompt: str
    images: tuple[Any, ...]
    reference: Any = None
    categories: tuple[str, ...] = ()
    unit: str = ""
    cluster: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[dict, ...] = ()
    placed: bool = False
    candidates: tuple[tuple[str, str], ...] = ()

    def request(self) -> dict[str, Any]:
        """The engine's request."""
        if self.placed:
            messages = [*self.history, {"role": "user", "content": self.prompt}]
        else:
            items = [{"type": "image"} for _ in self.images] + [{"type": "text", "text": self.prompt}]
            messages = [*self.history, {"role": "user", "content": items}]
        return {"messages": messages, "images": list(self.images), "id": self.id}


@dataclass(frozen=True)
class Answer:
    """A model's answer. `error` is the reason for a missing answer (for example, an image cannot be decoded)."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    finish: str = "stop"
    error: str | None = None


@dataclass(frozen=True)
class Scored:
    """A question with its answer. `read` is the parsed answer (None: it could not be parsed). `score` is from 0 to 1,
    or None if a judge has not scored it yet or the data has no reference. `marks` are a judge's grades by name.
    """

    question: Question
    answer: Answer
    read: Any
    score: float | None
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Units:
    """The scored units of a task: columns float64 [units], and each unit's categories and cluster index."""

    names: list[str]
    columns: Columns
    categories: list[tuple[str, ...]]
    cluster: np.ndarray

    @functools.cached_property
    def by_category(self) -> dict[str, np.ndarray]:
        """Return {category: bool [units]}, sorted by name."""
        members: dict[str, list[int]] = {}
        for number, names in enumerate(self.categories):
            for name in names:
                members.setdefault(name, []).append(number)
        found = {}
        for name in sorted(members):
            found[name] = np.zeros(len(self.names), bool)
            found[name][members[name]] = True
        return found

    def of(self, chosen: np.ndarray) -> Columns:
        """Return the columns of the units selected by `chosen`, bool [units]."""
        return {name: values[chosen] for name, values in self.columns.items()}


@dataclass(frozen=True)
class DataFile:
    """A file or folder of a task, relative to the task's folder. `instead` lists alternatives."""

    path: str
    what: str
    instead: tuple[str, ...] = ()


class Task:
    """Base class of tasks. A subclass sets the attributes and implements `questions`. The rest has defaults.

    argument    the part of the name after the colon ("gqa:val" -> "val"), or "".
    folder      the subfolder of --data, as in the original LLaVA's playground/data/eval. Files may also be directly in
                --data.
    source      the origin of the files. `scorer` is the origin of the metric.
    main        the main metric of the task.
    unit        the unit of the metrics: "%" (0 to 100) or "points".
    """

    name = ""
    title = ""
    folder = ""
    files: tuple[DataFile, ...] = ()
    source = ""
    scorer = ""
    main = "accuracy"
    unit = "%"
    max_new_tokens = 64
    arguments = ""  # allowed arguments, printed by `--tasks`
    judged = False  # scores come from `llava-fast judge`

    def __init__(self, argument: str = "") -> None:
        self.argument = argument

    def questions(self, folder: Path) -> list[Question]:
        """Read all questions from the files in `folder`. Raises EvaluationError, which names file and field."""
        raise NotImplementedError

    def with_candidates(self, question: Question) -> Question | None:
        """The question with `candidates` (and, if the protocol has one, another prompt), for `--choose likelihood`.
        None: the task has no options to choose from."""
        return None

    def read(self, question: Question, text: str) -> Any:
        """Parse an answer to a JSON value. Returns None if that is impossible."""
        return text.strip()

    def score(self, question: Question, read: Any) -> float | None:
        """Return the score from 0 to 1. `read` is not None and the question has a reference."""
        raise NotImplementedError

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        """Return the values of one unit from which metrics are computed. Keys that some units lack are dropped."""
        return {"score": float(np.mean([scored.score or 0.0 for scored in unit]))}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        """Compute the metrics. Each unit counts `weights` times, float64 [units]."""
        return {self.main: 100 * mean(columns["score"], weights)}

    def overall(self, units: Units, weights: np.ndarray) -> dict[str, float]:
        """Compute the weighted metrics of all units."""
        return self.metrics(units.columns, weights)

    def submission(self, scored: Iterable[Scored]) -> Any:
        """Return the answers in the format of the task's evaluation server or script, JSON, or None if there is
        none."""
        return None

    # ------------------------------------------------------------ not for subclasses

    def scored(self, questions: Iterable[Question], answers: Mapping[str, Answer]) -> list[Scored]:
        """Score each question with its answer. A failed or unparsable answer scores 0."""
        found = []
        for question in questions:
            answer = answers[question.id]
            read = self.read(question, answer.text) if answer.error is None else None
            score = None
            if not self.judged and question.reference is not None:
                score = 0.0 if read is None else float(self.score(question, read) or 0.0)
            found.append(Scored(question, answer, read, score))
        return found

    def units(self, scored: Iterable[Scored]) -> Units | None:
        """Return the units of the answers with scores, or None if there are none."""
        groups: dict[str, list[Scored]] = {}
        for each in scored:
            if each.score is not None:
                groups.setdefault(each.question.unit or each.question.id, []).append(each)
        if not groups:
            return None
        columns = [self.columns(group) for group in groups.values()]
        shared = set.intersection(*(set(each) for each in columns))
        clusters: dict[str, int] = {}
        number = [clusters.setdefault(cluster_of(group[0].question), len(clusters)) for group in groups.values()]
        return Units(
            list(groups),
            {key: np.array([each[key] for each in columns], np.float64) for key in columns[0] if key in shared},
            [group[0].question.categories for group in groups.values()],
            np.array(number, np.int64),
        )


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return ratio(float(values @ weights), float(weights.sum()))


def ratio(part: float, whole: float) -> float:
    """Divide. Returns NaN (undefined) for a zero denominator."""
    return part / whole if whole else float("nan")


def relative(image: str, folder: Path) -> str:
    """Return an image's path relative to `folder`, or a data: URI as it is."""
    return image if is_uri(image) else os.path.relpath(image, folder)


def is_uri(image: Any) -> bool:
    """Return whether an image is a data: URI."""
    return isinstance(image, str) and image.startswith("data:")


def cluster_of(question: Question) -> str:
    """Return the key of a question's cluster: its `cluster`, else its first image, else its unit or id."""
    if question.cluster:
        return question.cluster
    first = question.images[0] if question.images else None
    return first if isinstance(first, str) else (question.unit or question.id)
