"""Requests to a judge, repeated until the reply can be parsed. Unparsable replies are counted and never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from llava_fast.endpoint import Ask, Request

T = TypeVar("T")
TEMPERATURE = 0.2  # llava/eval/eval_gpt_review_bench.py; above 0, so that a repeated request can give another reply
_NUMBER = r"(\d+(?:\.\d+)?)"


class Made(Sequence[Request]):
    """`size` requests, each made by its number whenever it is read, because images in requests take memory."""

    def __init__(self, size: int, make: Callable[[int], Request]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(self.size)[number]]
        return self.make(range(self.size)[number])


@dataclass
class Counts:
    """malformed: replies that could not be parsed. unread: requests without any parsable reply. failed: requests
    without a reply.
    """

    requests: int = 0
    malformed: int = 0
    unread: int = 0
    failed: int = 0


@dataclass
class Verdict(Generic[T]):
    """The outcome of a request: the parsed value or None, and the texts of all replies."""

    value: T | None = None
    texts: list[str] = field(default_factory=list)


def ask_and_read(
    ask: Ask,
    requests: Sequence[Request],
    read: Sequence[Callable[[str], T | None]],
    tries: int,
    title: str,
    counts: Counts,
) -> list[Verdict[T]]:
    """Send the requests. A request is repeated, up to `tries` times in all, if `read` returns None for its reply or if
    the reply was truncated or refused.
    """
    verdicts = [Verdict[T]() for _ in range(len(requests))]
    left = list(range(len(requests)))
    counts.requests += len(requests)
    for draw in range(tries):
        if not left:
            break
        again = f"{title}, try {draw + 1}" if draw else title
        asked = Made(len(left), _drawn(requests, left, draw))
        malformed = []
        for number, reply in zip(left, ask(asked, again), strict=True):
            if reply is None:
                counts.failed += 1
                continue
            verdicts[number].texts.append(reply.text or reply.refusal)
            verdicts[number].value = read[number](reply.text) if reply.is_whole else None
            if verdicts[number].value is None:
                counts.malformed += 1
                malformed.append(number)
        left = malformed
    counts.unread += len(left)
    return verdicts


def _drawn(requests: Sequence[Request], numbers: Sequence[int], draw: int) -> Callable[[int], Request]:
    return lambda at: replace(requests[numbers[at]], draw=draw)


def read_pair(text: str) -> tuple[float, float] | None:
    """Parse two grades from 1 to 10, separated by spaces or a comma, which must be the whole first line."""
    found = re.fullmatch(rf"\s*{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}\s*", text.strip().split("\n")[0])
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


def read_share(text: str) -> float | None:
    """Parse a number from 0 to 1, which must be the whole reply."""
    found = re.fullmatch(rf"{_NUMBER}\.?", text.strip())
    return float(found[1]) if found is not None and float(found[1]) <= 1 else None
