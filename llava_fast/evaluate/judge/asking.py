"""Asking a judge until its reply can be read; what cannot is counted and never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from llava_fast.endpoint import Ask, Request

T = TypeVar("T")
TEMPERATURE = 0.2  # llava/eval/eval_gpt_review_bench.py; again at a malformed reply, another draw may be read
_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass
class Counts:
    """malformed: replies that could not be read. unread: requests that no reply of could be read. failed: requests
    without a reply.
    """

    requests: int = 0
    malformed: int = 0
    unread: int = 0
    failed: int = 0


@dataclass
class Verdict(Generic[T]):
    """What a request came to: the value that was read, if any, and every reply's text."""

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
    """Ask the requests; those whose reply `read` returns None for, or that was cut off or refused, are asked again, up
    to `tries` times in all.
    """
    verdicts = [Verdict[T]() for _ in requests]
    left = list(range(len(requests)))
    counts.requests += len(requests)
    for draw in range(tries):
        if not left:
            break
        again = f"{title}, try {draw + 1}" if draw else title
        asked = [replace(requests[number], draw=draw) for number in left]
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


def read_pair(text: str) -> tuple[float, float] | None:
    """Two grades from 1 to 10 that are all of the first line, separated by spaces or a comma."""
    found = re.fullmatch(rf"\s*{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}\s*", text.strip().split("\n")[0])
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None


def read_share(text: str) -> float | None:
    """A number from 0 to 1 that is all of the reply."""
    found = re.fullmatch(rf"{_NUMBER}\.?", text.strip())
    return float(found[1]) if found is not None and float(found[1]) <= 1 else None
