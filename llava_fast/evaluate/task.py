"""What a task of an evaluation is: questions from published files, the reading of an answer, its score, the metrics."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Columns = Mapping[str, np.ndarray]
"""Name -> float64 [units]."""


@dataclass(frozen=True)
class Question:
    """One question to a model.

    id          unique in its task.
    text        the question as a report shows it; `prompt` is all that the model reads after its pictures.
    images      paths, the bytes of files, or uint8 arrays [H, W, 3].
    reference   what the scorer compares an answer with, JSON; None: the data holds no answer (a test split).
    categories  metrics are also given for each of these.
    unit        questions of one unit are scored together (a circular question's passes). Default: the question alone.
    cluster     units of one cluster depend on each other: intervals resample clusters. Default: by the first image.
    facts       what else the scorer or a judge needs, JSON.
    history     messages before this question, for a conversation (OpenAI's form).
    placed      texts of history and prompt hold `<image>` where the pictures belong; otherwise they come first.
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
    """What a model answered. `error`: why there is no answer (a picture that cannot be decoded)."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    finish: str = "stop"
    error: str | None = None


@dataclass(frozen=True)
class Scored:
    """A question with its answer. `read` is what the parser made of the answer (None: unreadable), `score` 0 to 1, or
    None where only a judge can tell and has not, or the data holds no reference. `marks`: what a judge gave, by name.
    """

    question: Question
    answer: Answer
    read: Any
    score: float | None
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Units:
    """The scored units of a task: columns float64 [units], each unit's categories, and its cluster's number."""

    names: list[str]
    columns: Columns
    categories: list[tuple[str, ...]]
    cluster: np.ndarray

    @functools.cached_property
    def by_category(self) -> dict[str, np.ndarray]:
        """Category, in order of its name -> bool [units]."""
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
        """The columns of some units; chosen bool [units]."""
        return {name: values[chosen] for name, values in self.columns.items()}


@dataclass(frozen=True)
class DataFile:
    """A file or folder that a task reads, relative to its own; `instead` names others that serve as well."""

    path: str
    what: str
    instead: tuple[str, ...] = ()


class Task:
    """A task by name. A subclass sets the attributes and implements `questions`; the rest has defaults.

    argument    what followed the name on the command line ("gqa:val" -> "val"); "" for none.
    folder      where the files are below --data, as in the original LLaVA's playground/data/eval; --data itself
                serves as well.
    source      where the files come from; `scorer` what the metric follows.
    main        the metric that stands for the task.
    unit        of the metrics: "%" (0 to 100) or "points".
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
    arguments = ""  # what an argument may be, for `--tasks`
    judged = False  # scores come from `llava-fast judge`

    def __init__(self, argument: str = "") -> None:
        self.argument = argument

    def questions(self, folder: Path) -> list[Question]:
        """All questions, from the files in `folder`. Raises EvaluationError, naming file and field."""
        raise NotImplementedError

    def read(self, question: Question, text: str) -> Any:
        """What an answer says, JSON; None if it cannot be read."""
        return text.strip()

    def score(self, question: Question, read: Any) -> float | None:
        """0 to 1. `read` is never None and the question has a reference."""
        raise NotImplementedError

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        """What the metrics are computed from, for one unit. Keys that not all units have are dropped."""
        return {"score": float(np.mean([scored.score or 0.0 for scored in unit]))}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        """The metrics of some units; weights float64 [units]: how often each counts."""
        return {self.main: 100 * mean(columns["score"], weights)}

    def overall(self, units: Units, weights: np.ndarray) -> dict[str, float]:
        """The metrics of all units."""
        return self.metrics(units.columns, weights)

    def submission(self, scored: Iterable[Scored]) -> Any:
        """The answers as the task's own server or script takes them, JSON; None: it has no such form."""
        return None

    # ------------------------------------------------------------ not for subclasses

    def scored(self, questions: Iterable[Question], answers: Mapping[str, Answer]) -> list[Scored]:
        """Each question with its answer. An answer that failed or cannot be read scores 0."""
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
        """The units of the answers that have scores; None: no answer has one."""
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
    """NaN where there is nothing to divide by: such a metric is undefined, not 0."""
    return part / whole if whole else float("nan")


def cluster_of(question: Question) -> str:
    """What the question depends on together with others: its cluster, or its first image, or itself."""
    if question.cluster:
        return question.cluster
    first = question.images[0] if question.images else None
    return first if isinstance(first, str) else (question.unit or question.id)
