"""Instruction data as for the first LLaVA: a language model writes about an image, given its captions and boxes.

The paper's 158K samples are 58K conversations, 23K detailed descriptions and 77K of complex reasoning (arXiv
2304.08485; LLaVA's docs/Data.md); `MIX` has these shares.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_fast.datagen.filters import Duplicates, Pairs, Unusable, problem, read_pairs, usable_turns, whole_text
from llava_fast.datagen.output import Report, turns
from llava_fast.datagen.records import Record
from llava_fast.datagen.wording import Patterns, Prompt, Texts
from llava_fast.endpoint import Ask, Reply, Request
from llava_fast.errors import DataError

MIX = {"conversation": 58.0, "detail": 23.0, "reasoning": 77.0}


@dataclass(frozen=True)
class Task:
    """A sample to generate."""

    kind: str
    record: Record


@dataclass
class Instruct:
    """Generates samples of several kinds.

    mix      share of each kind, by the name of its text. Shares are normalised.
    count    number of requested samples. Default: one per record.
    """

    texts: Texts = field(default_factory=Texts)
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            not self.mix
            or not all(0 <= share < float("inf") for share in self.mix.values())
            or not any(self.mix.values())
        ):
            raise DataError(f"the mix {dict(self.mix)} has no share above 0: give some as conversation=58")
        self.prompts = {kind: self.texts.read(kind, Prompt) for kind, share in self.mix.items() if share}
        for kind, prompt in self.prompts.items():
            if prompt.form == "answer" and not prompt.questions:
                raise DataError(f"{kind}.yaml has the form `answer` and no questions to draw from: list some")
        self.patterns = self.texts.read("filters", Patterns)

    def tasks(self, records: Sequence[Record]) -> list[Task]:
        """Return the tasks. Records of each kind are drawn by seed and spread evenly over all records.

        Raises DataError if a kind gets more samples than there are records for it.
        """
        if not records:
            raise DataError("there is no record to make data from")
        tasks = []
        start = 0
        for kind, number in shares(self.mix, len(records) if self.count is None else self.count).items():
            if not number:
                continue
            needs = self.prompts[kind].needs
            fit = [record for record in records if all(getattr(record, each) for each in needs)]
            if number > len(fit):
                have = (
                    f"{len(fit):,} of {len(records):,} records have {' and '.join(needs)}"
                    if needs
                    else "too few records"
                )
                raise DataError(
                    f"{number:,} samples of kind {kind} are asked for, and {have}: lower the count or change the mix"
                )
            order = random.Random(f"{self.seed} order").sample(range(len(fit)), len(fit))
            tasks += [Task(kind, fit[order[(start + each) % len(fit)]]) for each in range(number)]
            start += number
        return tasks

    def request(self, task: Task) -> Request:
        prompt = self.prompts[task.kind]
        return Request(prompt.messages(task.record.context()), prompt.options, name=_name(task))

    def make(self, records: Sequence[Record], ask: Ask, report: Report) -> Iterator[dict[str, Any]]:
        """Send the requests and yield the usable samples in LLaVA's format, in the order of tasks. `report` counts
        them."""
        tasks = self.tasks(records)
        replies = ask(Requests(tasks, self.request), "instruct")
        duplicates = Duplicates()
        for task, reply in zip(tasks, replies, strict=True):
            try:
                pairs = self.pairs(task, reply, report)
                duplicates.check(*self._same_if(task, pairs))
            except Unusable as why:
                report.left_out[str(why)] += 1
                continue
            report.made[task.kind] += 1
            yield self.sample(task, pairs)

    def pairs(self, task: Task, reply: Reply | None, report: Report) -> Pairs:
        """Return the turns of a reply. Raises Unusable."""
        text = whole_text(reply)
        prompt = self.prompts[task.kind]
        if prompt.form == "answer":
            if why := problem("", text, self.patterns):
                raise Unusable(why)
            return [(self._draw(task).choice(prompt.questions), text)]
        pairs = read_pairs(text, self.patterns)
        if prompt.form == "pair" and len(pairs) != 1:
            raise Unusable("not one question and answer")
        return usable_turns(pairs, self.patterns, report.left_out)

    def _same_if(self, task: Task, pairs: Pairs) -> list[str]:
        """The texts by which a sample is a duplicate of another: what the model wrote, and, where a kind may repeat
        itself, the picture."""
        prompt = self.prompts[task.kind]
        written = (
            [answer for _, answer in pairs] if prompt.form == "answer" else [text for each in pairs for text in each]
        )
        return [*written, *map(str, task.record.media().values())] if prompt.may_repeat else written

    def sample(self, task: Task, pairs: Pairs) -> dict[str, Any]:
        (first, answer), *more = pairs
        placeholders = task.record.placeholders().strip("\n")
        first_question = first
        if placeholders:  # before the question or after it, as in LLaVA's data
            before = self._draw(task, "place").random() < 0.5
            first_question = f"{placeholders}\n{first}" if before else f"{first}\n{placeholders}"
        return {"id": _name(task), **task.record.media(), "conversations": turns([(first_question, answer), *more])}

    def _draw(self, task: Task, what: str = "") -> random.Random:
        return random.Random(f"{self.seed} {_name(task)} {what}")


class Requests(Sequence[Request]):
    """A sequence of requests that are created on access."""

    def __init__(self, tasks: Sequence[Any], make: Any) -> None:
        self._tasks, self._make = tasks, make

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Requests(self._tasks[number], self._make)
        return self._make(self._tasks[number])


def shares(mix: Mapping[str, float], count: int) -> dict[str, int]:
    """Divide `count` by shares (largest remainder method), so that the parts sum to it."""
    total = sum(mix.values())
    exact = {kind: count * share / total for kind, share in mix.items()}
    parts = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: parts[kind] - exact[kind])
    for kind in by_remainder[: count - sum(parts.values())]:
        parts[kind] += 1
    return parts


def _name(task: Task) -> str:
    return f"{task.record.id}-{task.kind}"
