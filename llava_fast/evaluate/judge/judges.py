"""What is asked of a judge for each task, and how its grades become scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.endpoint import Ask, Request, image_part
from llava_fast.errors import EvaluationError
from llava_fast.evaluate.judge.asking import TEMPERATURE, Counts, Made, Verdict, ask_and_read, read_pair, read_share
from llava_fast.evaluate.judge.prompts import Prompts
from llava_fast.evaluate.metrics.choices import LETTERS, stated_letter
from llava_fast.evaluate.task import Scored

Read = Callable[[str], Any]
NO_ANSWER = "I cannot answer."
"""How the prompt `scienceqa-answer` has the judge say that a question needs its picture."""


@dataclass(frozen=True)
class Judging:
    """How a judge is asked. both_orders: each pair twice, each answer first once. runs: draws of a single grade. tries:
    how often a request is asked whose reply cannot be read.
    """

    prompts: Prompts
    both_orders: bool = True
    runs: int = 1
    tries: int = 3

    def settings(self) -> dict[str, Any]:
        return {"prompts": self.prompts.digest(), "both_orders": self.both_orders, "runs": self.runs}


@dataclass(frozen=True)
class Judged:
    """The answers with their scores and marks, and the judge's replies about each."""

    scored: list[Scored]
    reviews: list[list[str]]
    counts: Counts


def judge_pairs(scored: Sequence[Scored], folder: Path, judging: Judging, ask: Ask, sees: bool) -> Judged:
    """LLaVA-Bench: the model's answer beside the reference, graded from 1 to 10.

    sees  the judge sees the picture and is told which answer is the reference, which then has 10 (Wilder). Otherwise it
          reads the context of the question and is not told.

    Marks "reference" and "model": the means over both orders. A question whose reply in one order cannot be read has no
    score, because the order itself moves grades.
    """
    orders = (False, True) if judging.both_orders else (False,)
    readers = [_reader_of(swapped, sees) for _ in scored for swapped in orders]

    def pair(number: int) -> Request:
        which, order = divmod(number, len(orders))
        return _pair(scored[which], folder, judging.prompts, orders[order], sees)

    requests, counts = Made(len(readers), pair), Counts()
    verdicts: list[Verdict[Any]] = ask_and_read(ask, requests, readers, judging.tries, "grading pairs", counts)
    found, reviews = [], []
    for number, each in enumerate(scored):
        mine = verdicts[number * len(orders) : (number + 1) * len(orders)]
        reviews.append([text for verdict in mine for text in verdict.texts])
        grades = [verdict.value for verdict in mine if verdict.value is not None]
        if len(grades) < len(orders):
            found.append(dataclasses.replace(each, score=None, marks={}))
            continue
        reference, model = (sum(grade[at] for grade in grades) / len(grades) for at in (0, 1))
        found.append(dataclasses.replace(each, score=model / 10, marks={"reference": reference, "model": model}))
    return Judged(found, reviews, counts)


def _pair(scored: Scored, folder: Path, prompts: Prompts, swapped: bool, sees: bool) -> Request:
    question = scored.question
    answers = (question.reference, scored.answer.text)
    first, second = answers[::-1] if swapped else answers
    values = {"question": question.text, "first": first, "second": second}
    if sees:
        text = prompts.fill("pair-picture", **values, correct="2" if swapped else "1")
        pictures = [image_part(folder / image) for image in question.images]
        content: Any = [*pictures, {"type": "text", "text": text}]
    else:
        content = prompts.fill("pair", **values, context=question.facts["context"])
    options = {"temperature": TEMPERATURE, "max_tokens": 1024}
    return Request([{"role": "user", "content": content}], options, name=question.id)


def _reader_of(swapped: bool, sees: bool) -> Read:
    """Reads (the reference's grade, the model's)."""

    def read(text: str) -> tuple[float, float] | None:
        pair = read_pair(text)
        if pair is None:
            return None
        reference, model = pair[::-1] if swapped else pair
        return None if sees and reference != 10 else (reference, model)

    return read


def judge_mm_vet(scored: Sequence[Scored], judging: Judging, ask: Ask) -> Judged:
    """MM-Vet: a grade from 0 to 1 against the reference; the mean of `runs` draws."""
    requests = []
    for each in scored:
        question = each.question
        reference = question.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        values = {"question": question.text, "reference": reference, "answer": each.answer.text}
        text = judging.prompts.fill("mm-vet", **values)
        for run in range(judging.runs):
            options = {"temperature": 0.0, "max_tokens": 8, **({"seed": run} if run else {})}
            requests.append(Request([{"role": "user", "content": text}], options, name=question.id))
    counts = Counts()
    verdicts = ask_and_read(ask, requests, [read_share] * len(requests), judging.tries, "grading", counts)
    found, reviews = [], []
    for number, each in enumerate(scored):
        mine = verdicts[number * judging.runs : (number + 1) * judging.runs]
        grades = [verdict.value for verdict in mine if verdict.value is not None]
        reviews.append([text for verdict in mine for text in verdict.texts])
        whole = len(grades) == judging.runs
        found.append(dataclasses.replace(each, score=sum(grades) / len(grades) if whole else None))
    return Judged(found, reviews, counts)


def judge_scienceqa(scored: Sequence[Scored], judging: Judging, ask: Ask) -> Judged:
    """ScienceQA with a language model that does not see (LLaVA, arXiv 2304.08485, section 5.2). It answers alone; where
    it gives no answer, the model's counts ("complement"); where the two differ, it is asked again with both answers
    ("ensemble"), and where that gives none, the model's counts. Marks, 0 or 1: alone, complement, ensemble; none where
    the endpoint has not replied to one of the requests, and then the task has no such metrics before the next run asks
    again.
    """
    counts = Counts()
    prompts = judging.prompts

    def values(each: Scored) -> dict[str, str]:
        facts = each.question.facts
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, facts["options"], strict=False)]
        return {"question": each.question.text, "context": facts.get("hint") or "N/A", "options": "\n".join(lines)}

    def asked(text: str, name: str) -> Request:
        return Request([{"role": "user", "content": text}], {"temperature": 0.0, "max_tokens": 512}, name=name)

    def letter_of(each: Scored) -> Read:
        count = len(each.question.facts["options"])
        return lambda text: stated_letter(text, count)

    def letter_or_none_of(each: Scored) -> Read:
        """Reads a letter, or "" where the judge says that it cannot answer: the question may need its picture."""
        count = len(each.question.facts["options"])
        return lambda text: stated_letter(text, count) or ("" if text.strip().endswith(NO_ANSWER) else None)

    requests = [asked(prompts.fill("scienceqa-answer", **values(each)), each.question.id) for each in scored]
    readers = [letter_or_none_of(each) for each in scored]
    alone = ask_and_read(ask, requests, readers, judging.tries, "answering alone", counts)
    letters = [verdict.value or None for verdict in alone]
    differ = [n for n, each in enumerate(scored) if letters[n] is not None and letters[n] != each.read]
    requests = [
        asked(
            prompts.fill(
                "scienceqa-ensemble", **values(scored[n]), blind=alone[n].texts[-1], seeing=scored[n].answer.text
            ),
            scored[n].question.id,
        )
        for n in differ
    ]
    readers = [letter_of(scored[n]) for n in differ]
    weighed = dict(zip(differ, ask_and_read(ask, requests, readers, judging.tries, "weighing", counts), strict=True))
    found, reviews = [], []
    for n, each in enumerate(scored):
        complement = letters[n] or each.read
        last = weighed[n].value if n in weighed else None
        ensemble = (last or each.read) if n in weighed else complement
        chosen = {"alone": letters[n], "complement": complement, "ensemble": ensemble}
        marks = {name: float(letter == each.question.reference) for name, letter in chosen.items()}
        asked_of = [alone[n], weighed[n]] if n in weighed else [alone[n]]
        reviews.append([text for verdict in asked_of for text in verdict.texts])
        found.append(dataclasses.replace(each, marks=marks if all(verdict.texts for verdict in asked_of) else {}))
    return Judged(found, reviews, counts)


def judge(task: str, scored: Sequence[Scored], folder: Path, judging: Judging, ask: Ask) -> Judged:
    """Ask a judge about the answers to a task. An answer that failed is not shown to it and has no score. Raises
    EvaluationError for a task that none scores.
    """
    name = task.partition(":")[0]
    if name != "scienceqa" and any(each.answer.error is not None for each in scored):
        whole = judge(task, [each for each in scored if each.answer.error is None], folder, judging, ask)
        found = {each.question.id: (each, review) for each, review in zip(whole.scored, whole.reviews, strict=True)}
        pairs = [found.get(each.question.id, (dataclasses.replace(each, score=None, marks={}), [])) for each in scored]
        return Judged([each for each, _ in pairs], [review for _, review in pairs], whole.counts)
    if name in ("llava-bench", "llava-bench-coco", "llava-bench-wilder"):
        return judge_pairs(scored, folder, judging, ask, sees=name == "llava-bench-wilder")
    if name == "mm-vet":
        return judge_mm_vet(scored, judging, ask)
    if name == "scienceqa":
        return judge_scienceqa(scored, judging, ask)
    raise EvaluationError(f"no judge scores {task}: {', '.join(JUDGED)} have one")


JUDGED = ("llava-bench", "llava-bench-coco", "llava-bench-wilder", "mm-vet", "scienceqa")
