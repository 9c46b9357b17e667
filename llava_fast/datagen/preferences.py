"""Preference pairs from a model's own answers, as LLaVA-Hound (arXiv 2404.01258) and LLaVA-NeXT-Video's DPO data:
several answers are drawn for a question, each is scored by a language model with captions as evidence, and a good
answer is paired with a bad one. Questions whose answers are all good or all bad give no pair.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_fast.datagen.filters import Unusable, whole, whole_text
from llava_fast.datagen.instruct import Requests
from llava_fast.datagen.output import Report
from llava_fast.datagen.plugins import function
from llava_fast.datagen.records import Record
from llava_fast.datagen.samples import Given
from llava_fast.datagen.wording import Judging
from llava_fast.endpoint import Ask, Request, image_part
from llava_fast.evaluate import task as evaluated
from llava_fast.evaluate.workers import Answerer
from llava_fast.storage.journal import Journal, file_identity

REFERENCE = "reference"
ENDPOINT = "endpoint"


@dataclass(frozen=True)
class Question:
    """A sample's first question: what is asked, its data's own answer, and what is known about the picture."""

    sample: Given
    images: Path
    evidence: str

    @property
    def text(self) -> str:
        return self.sample.pairs[0][0]

    @property
    def reference(self) -> str:
        return self.sample.pairs[0][1]

    @property
    def prompt(self) -> str:
        """The question with its placeholders, as a pair of preferences has it."""
        marks = "<video>\n" if self.sample.video else "<image>\n" * len(self.sample.images)
        return marks + self.text

    def paths(self) -> list[str]:
        return [str(self.images / image) for image in self.sample.images]

    def to_engine(self, name: str) -> evaluated.Question:
        if self.sample.video:
            video = str(self.images / self.sample.video)
            return _Asked(name, self.text, self.prompt, (), placed=True, video=video)
        return _Asked(name, self.text, self.text, tuple(self.paths()))


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn: `count` a question, at a temperature, none longer than `max_tokens`."""

    count: int = 6
    temperature: float = 1.0
    max_tokens: int = 256
    seed: int = 0


def questions(samples: Sequence[Given], records: Sequence[Record], images: Path, report: Report) -> list[Question]:
    """The first question of each sample, with the captions of the record of the same picture as evidence, or else the
    data's own answer. The same question about the same picture is asked once."""
    named = ((record.image or record.video, record.context()) for record in records)
    known = {name: context for name, context in named if isinstance(name, str) and context}
    found: dict[tuple[Any, ...], Question] = {}
    for sample in samples:
        key = (*sample.media, sample.pairs[0][0])
        if key in found:
            report.left_out["the same question about the same picture"] += 1
            continue
        evidence = known.get(sample.media[0]) if len(sample.media) == 1 else None
        found[key] = Question(sample, images, evidence or f"A right answer: {sample.pairs[0][1]}")
    return list(found.values())


@dataclass(frozen=True)
class _Asked(evaluated.Question):
    """A question to the engine; `video` is a path."""

    video: str = ""

    def request(self) -> dict[str, Any]:
        return {**super().request(), **({"video": self.video} if self.video else {})}


def draw_by_engine(
    answer: Answerer, model: str, asked: Sequence[Question], drawing: Drawing, journal: Journal, report: Report
) -> list[list[str]]:
    """Each question's answers by the engine, in this process, several or on Ray (evaluate.workers). Answers drawn
    before come from the journal. An answer that fails, is empty or is cut at `max_tokens` is counted and given as "".

    model  whatever answers depend on besides the question.
    """
    keys = [_keys(model, question, drawing) for question in asked]
    for draw in range(drawing.count):
        left = [number for number in range(len(asked)) if keys[number][draw] not in journal]
        if not left:
            continue
        options = {
            "temperature": drawing.temperature,
            "max_new_tokens": drawing.max_tokens,
            "seed": drawing.seed + draw,
        }
        answers = answer([asked[number].to_engine(str(number)) for number in left], options)
        for question, found in tqdm(answers, f"answer {draw + 1} of {drawing.count}", len(left), unit="question"):
            if found.error is not None:
                report.left_out["answers that the model could not give"] += 1
                report.notes["an error"] = f"{asked[int(question.id)].sample.name}: {found.error}"
                continue
            journal.append({"key": keys[int(question.id)][draw], "answer": found.text, "finish": found.finish})

    def kept(key: str) -> str:
        if (entry := journal.entry(key)) is None:
            return ""  # it failed and was counted above
        return _counted(lambda: whole(entry["answer"], entry["finish"]), report)

    return [[kept(key) for key in each] for each in keys]


def draw_by_endpoint(ask: Ask, asked: Sequence[Question], drawing: Drawing, report: Report) -> list[list[str]]:
    """As `draw_by_engine`, through an endpoint, pictures sent with each request; also "" and counted for a refusal.
    Videos cannot be sent."""
    options = {"temperature": drawing.temperature, "max_tokens": drawing.max_tokens}

    def request(task: tuple[Question, int]) -> Request:
        question, draw = task
        content = [*map(image_part, question.paths()), {"type": "text", "text": question.text}]
        return Request(
            [{"role": "user", "content": content}], {**options, "seed": drawing.seed + draw}, draw, question.sample.name
        )

    tasks = [(question, draw) for question in asked for draw in range(drawing.count)]
    replies = ask(Requests(tasks, request), "answers")
    texts = [_counted(functools.partial(whole_text, reply), report) for reply in replies]
    return [texts[start : start + drawing.count] for start in range(0, len(texts), drawing.count)]


def _counted(read: Callable[[], str], report: Report) -> str:
    """What `read` returns, or "" if it raises Unusable, whose reason is counted."""
    try:
        return read()
    except Unusable as why:
        report.left_out[f"answers: {why}"] += 1
        return ""


def _keys(name: str, question: Question, drawing: Drawing) -> list[str]:
    """The journal's key of each draw."""
    files = [file_identity(question.images / each) for each in question.sample.media]
    told = [name, question.prompt, files, drawing.temperature, drawing.max_tokens]
    seeds = range(drawing.seed, drawing.seed + drawing.count)
    return [hashlib.blake2b(json.dumps([*told, seed]).encode(), digest_size=16).hexdigest() for seed in seeds]


Scored = list[dict[str, float]]
"""Of each question, the scores of its distinct answers; one without a score is left out."""


def score_by_endpoint(
    ask: Ask, asked: Sequence[Question], answers: Sequence[Sequence[str]], judging: Judging, report: Report
) -> Scored:
    """A reply that is cut short, refuses or has no single readable score is counted, and its answer left out: no score
    is guessed."""
    tasks = [(number, answer) for number, given in enumerate(answers) for answer in dict.fromkeys(given) if answer]

    def request(task: tuple[int, str]) -> Request:
        question = asked[task[0]]
        told = {"context": question.evidence, "question": question.text, "answer": task[1]}
        user = re.sub(r"\{(context|question|answer)\}", lambda found: told[found[1]], judging.user)
        messages = [{"role": "system", "content": judging.system}, {"role": "user", "content": user}]
        return Request(messages, judging.options, name=question.sample.name)

    scored: Scored = [{} for _ in asked]
    for (number, answer), reply in zip(tasks, ask(Requests(tasks, request), "scores"), strict=True):
        value = _score(reply.text, judging) if reply is not None and reply.is_whole else None
        if value is None:
            report.left_out["answers without a score" if reply is not None else "answers without a reply"] += 1
            continue
        scored[number][answer] = value
    return scored


def _score(text: str, judging: Judging) -> float | None:
    found = [each[1] for each in re.finditer(judging.score, text, re.IGNORECASE | re.MULTILINE)]
    if len(found) != 1:
        return None
    try:
        value = float(found[0] or "")
    except ValueError:
        return None
    return value if judging.least <= value <= judging.most else None


def score_by_rule(name: str, asked: Sequence[Question], answers: Sequence[Sequence[str]]) -> Scored:
    """ "reference": 1 for the data's own answer, but for case, spaces and a last dot, else 0; or "module:function" from
    (question, answer, reference, evidence) to a number. Raises DataError for a function that is not there."""
    rule: Callable[..., float] = _equals if name == REFERENCE else function(name, "the rule")
    return [
        {
            answer: float(rule(each.text, answer, each.reference, each.evidence))
            for answer in dict.fromkeys(given)
            if answer
        }
        for each, given in zip(asked, answers, strict=True)
    ]


def _equals(question: str, answer: str, reference: str, evidence: str) -> float:
    return float(_plain(answer) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def pairs(
    asked: Sequence[Question], scored: Scored, good: float, report: Report, seed: int = 0, with_reference: bool = False
) -> Iterator[dict[str, Any]]:
    """A pair for each question with an answer of a score of at least `good` and one below, each drawn by the seed.

    with_reference  where no answer is good, the data's own is preferred to an answer that differs from it.
    """
    for question, scores in zip(asked, scored, strict=True):
        chosen = [answer for answer, score in scores.items() if score >= good]
        rejected = [answer for answer, score in scores.items() if score < good]
        if not chosen and with_reference:
            rejected = [answer for answer in rejected if _plain(answer) != _plain(question.reference)]
            chosen = [question.reference] if rejected else []
        if not scores or not chosen or not rejected:
            why = "no scored answer" if not scores else "all answers good" if chosen else "all answers bad"
            report.left_out[f"questions: {why}"] += 1
            continue
        draw = random.Random(f"{seed} {question.sample.name} {question.text}")
        report.made["pairs"] += 1
        yield {
            "id": question.sample.name,
            **_media(question.sample.value),
            "prompt": question.prompt,
            "chosen": draw.choice(chosen),
            "rejected": draw.choice(rejected),
        }


def _media(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value[key] for key in ("image", "video") if value.get(key)}
