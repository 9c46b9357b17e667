"""Single answers that are labelled desirable or undesirable, for KTO.

A sample is an object {"id", "image" | "images" | "video", "prompt", "completion", "label"}, where `label` is true for a
desirable answer and false for an undesirable one ("prompt" as in data.pairs), or an ordinary sample (`conversations` or
`messages`) with a `label` for its last answer. A preference pair (data.pairs) is read as two samples: its chosen answer
is desirable, its rejected answer undesirable.

KTO also pairs each question with an answer to another question. Both answers follow the question in one sequence, as
branches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_fast.errors import DataError
from llava_fast.inputs.plan.plan import TextPiece, sequence_length
from llava_fast.inputs.prepared import Cut
from llava_fast.inputs.processor import Processor
from llava_fast.train.data.pairs import (
    PAIR_KEYS,
    SharedPair,
    TwoAnswers,
    answer_text,
    conversation,
    last_answer,
    prompt_turns,
)
from llava_fast.train.data.samples import READ_KEYS, Sample, SampleTable, Source, read_sources
from llava_fast.train.data.schedule import Schedule

LABELLED_KEYS = tuple(dict.fromkeys((*READ_KEYS, *PAIR_KEYS, "completion", "label")))
_ANSWERS = ("completion", "chosen", "answer", "rejected")
_NEEDS = "a sample needs prompt, completion and label"


class LabelledTable(SampleTable):
    """Samples with one label each."""

    def sample(self, number: int, value: Any) -> Sample:
        try:
            given = _as_ordinary(value)
        except DataError as error:
            raise DataError(f"{self._name(number, value)}: {error}", error.kind) from None
        return super().sample(number, given)

    def desirable(self, number: int) -> bool:
        """The label of a valid sample."""
        return bool(self.value(number)["label"])

    def question(self, number: int) -> bytes:
        """A hash of a sample without its last answer and its label."""
        value = {key: part for key, part in self.value(number).items() if key not in ("id", "label", *_ANSWERS)}
        for key in ("conversations", "messages"):
            if key in value:
                value[key] = value[key][:-1]
        return hashlib.blake2b(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).digest()


def read_labelled(sources: Sequence[Source]) -> LabelledTable:
    """Read the files of a run's sources, as `data.read_sources` does, with its errors."""
    return LabelledTable(**vars(read_sources(sources, keys=LABELLED_KEYS, split=_split)))


def _split(value: Any) -> list[Any]:
    """The samples of a value in a data file: two for a pair, else the value itself."""
    if not isinstance(value, dict) or "label" in value or "rejected" not in value:
        return [value]
    shared = {key: part for key, part in value.items() if key not in _ANSWERS}
    chosen = "chosen" if "chosen" in value else "answer"
    if value.get(chosen) in (None, value["rejected"]):
        return [value]  # reading the sample raises the error
    return [
        {**shared, chosen: value[chosen], "label": True},
        {**shared, "rejected": value["rejected"], "label": False},
    ]


def _as_ordinary(value: Any) -> dict[str, Any]:
    """A labelled sample in the format of an ordinary one. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError("a sample must be an object with prompt, completion and label")
    if "label" not in value and "rejected" in value:
        answer_text(value, "chosen" if "chosen" in value else "answer", "a pair needs prompt, chosen and rejected")
        raise DataError("its two answers are the same, so neither can be preferred: leave it out")
    if not isinstance(value.get("label"), bool):
        raise DataError("it needs a label: true if its answer is desirable, false if it is not")
    if "conversations" in value or "messages" in value:
        turns = value.get("conversations", value.get("messages"))
        last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
        if last.get("from", last.get("role", "gpt")) not in ("gpt", "assistant"):
            raise DataError("it must end with the labelled answer", "roles and turns")
        return {key: part for key, part in value.items() if key in READ_KEYS}
    key = next((key for key in _ANSWERS if key in value), "completion")
    return conversation(value, prompt_turns(value), answer_text(value, key, _NEEDS))


def mismatched(table: LabelledTable, schedule: Schedule) -> np.ndarray:
    """int64 [samples]: the sample whose answer is paired with each sample's question, -1 for samples that are in no
    step. It is the next sample with another question in the first step that contains the sample.

    Raises DataError if all samples have the same question.
    """
    found = np.full(len(table), -1, np.int64)
    questions: dict[int, bytes] = {}
    alone: list[int] = []  # samples in a step without another question
    for step in range(schedule.total):
        numbers = schedule.samples(step).tolist()
        first = {number: place for place, number in enumerate(numbers) if number not in questions}
        questions |= {number: table.question(number) for number in first}
        for number, place in first.items():
            others = (*numbers[place + 1 :], *numbers[:place])
            found[number] = next((other for other in others if questions[other] != questions[number]), -1)
        alone += [number for number in first if found[number] < 0]
    for number in alone:
        other = next((other for other in questions if questions[other] != questions[number]), None)
        if other is None:
            raise DataError("all samples have the same question: KTO compares answers with those to another one")
        found[number] = other
    return found


class LabelledBatches(TwoAnswers):
    """Micro-batches of questions with their own answer and a mismatched one. The plan has an additional column
    "desirable" [sequences], 1 or 0.

    others  int64 [samples], see `mismatched`.
    """

    def __init__(
        self, table: LabelledTable, processor: Processor, others: np.ndarray, references: np.ndarray | None = None
    ) -> None:
        super().__init__(processor, references)
        self.table, self.others = table, others

    def pair(self, number: int, tiles: list[Cut]) -> SharedPair:
        request = self.table[number].request
        other = self.table[int(self.others[number])].request["messages"]
        *prefix, own = last_answer(self.processor.outline(request, labels=True))
        swapped = {**request, "messages": [*request["messages"][:-1], other[-1]]}
        mismatched = last_answer(self.processor.outline(swapped, labels=True))[-1]
        assert isinstance(own, TextPiece)
        assert own.supervised is not None
        assert isinstance(mismatched, TextPiece)
        assert mismatched.supervised is not None
        start = int(own.supervised.argmax())
        pieces = self.processor.pieces([*prefix, dataclasses.replace(own, ids=own.ids[:start], supervised=None)], tiles)
        answer = TextPiece(own.ids[start:], own.supervised[start:])
        self.processor.check_length([*pieces, answer])
        wrong = mismatched.ids[mismatched.supervised]
        if self.processor.max_rows is not None:  # truncate: the other question's answer may be too long here
            wrong = wrong[: max(self.processor.max_rows - sequence_length(pieces), 1)]
        return SharedPair(pieces, (answer, TextPiece(wrong, np.ones(len(wrong), bool))))

    def name(self, number: int) -> str:
        return self.table.name(number)

    def columns(self, numbers: list[int]) -> dict[str, np.ndarray]:
        return {"desirable": np.array([self.table.desirable(number) for number in numbers], np.int32)}
