"""Extraction of questions and answers from replies. Replies in another format are rejected, with a counted reason."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from llava_fast.datagen.wording import Patterns
from llava_fast.endpoint import Reply

_SPEAKER = re.compile(r"^[ \t*#>-]*(question|answer)[ \t]*\d*[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)

Pairs = list[tuple[str, str]]


class Unusable(ValueError):
    """A rejected reply or part of one. The message is the counted reason."""


def whole_text(reply: Reply | None) -> str:
    """Return the text of a complete reply. Raises Unusable."""
    if reply is None:
        raise Unusable("no reply")
    return whole(reply.text, reply.finish, reply.refusal)


def whole(text: str, finish: str, refusal: str = "") -> str:
    """Return a generated text, stripped, if it is complete. Raises Unusable."""
    if refusal or finish == "content_filter":
        raise Unusable("refusal")
    if not text.strip():
        raise Unusable("empty")
    if finish != "stop":
        raise Unusable("cut short")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("half a surrogate pair") from None
    return text.strip()


def read_pairs(text: str, patterns: Patterns) -> Pairs:
    """Return the questions and answers of a text whose turns begin with "Question:" and "Answer:". Text before the
    first turn is ignored. Raises Unusable if they do not alternate."""
    parts = _SPEAKER.split(text)[1:]
    speakers, said = [each.lower() for each in parts[::2]], [each.strip() for each in parts[1::2]]
    if not speakers:
        refused = patterns.compiled["refusals"].search(text)
        raise Unusable("refusal" if refused else "no questions and answers")
    if len(speakers) % 2 or speakers != ["question", "answer"] * (len(speakers) // 2):
        raise Unusable("wrong roles")
    return list(zip(said[::2], said[1::2], strict=True))


def problem(question: str, answer: str, patterns: Patterns) -> str:
    """Return why a turn is rejected, or "". An empty question is allowed, because it is drawn from a list."""
    if not answer:
        return "empty"
    if patterns.compiled["refusals"].search(answer):
        return "refusal"
    for text in (question, answer):
        if patterns.compiled["sources"].search(text):
            return "speaks of captions or boxes"
        if patterns.compiled["roles"].search(text):
            return "roles or placeholders inside a text"
    return ""


def usable_turns(pairs: Sequence[tuple[str, str]], patterns: Patterns, left_out: Counter[str]) -> Pairs:
    """Return the turns before the first unusable one, since later turns may refer to it. The number of removed turns
    and the reason are counted in `left_out`. Raises Unusable if no turn is left."""
    kept: Pairs = []
    for question, answer in pairs:
        why = "empty" if not question else problem(question, answer, patterns)
        why = why or ("repeated question" if question.lower() in {each.lower() for each, _ in kept} else "")
        if why:
            if not kept:
                raise Unusable(why)
            left_out[f"turns cut off: {why}"] += len(pairs) - len(kept)
            break
        kept.append((question, answer))
    return kept


class Duplicates:
    """Detects repeated texts."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def check(self, *texts: str) -> None:
        """Raise Unusable if the same texts, ignoring case and spaces, were checked before."""
        joined = "\0".join(" ".join(text.lower().split()) for text in texts)
        key = hashlib.blake2b(joined.encode(), digest_size=16).digest()
        if key in self._seen:
            raise Unusable("duplicate")
        self._seen.add(key)
