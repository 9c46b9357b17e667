"""The questions of the digits demo about a canvas, and their exact answers."""

from __future__ import annotations

import numpy as np

PHRASINGS: dict[str, tuple[str, ...]] = {
    "read": ("What digits are written here?", "Read the digits.", "Which digits do you see?"),
    "count": ("How many digits are there?", "How many digits do you see?", "Count the digits."),
    "largest": ("Which is the largest digit?", "What is the largest digit here?"),
    "top_left": ("Which digit is at the top left?", "What is the digit at the top left?"),
}
KINDS: tuple[str, ...] = tuple(PHRASINGS)
NONE = "none"


def ask(rng: np.random.Generator, kind: str) -> str:
    """One phrasing of a question of the given kind, drawn uniformly. Raises KeyError for an unknown kind."""
    phrasings = PHRASINGS[kind]
    return phrasings[int(rng.integers(len(phrasings)))]


def answer(kind: str, digits: list[int]) -> str:
    """The exact answer for the digits of a canvas in reading order.

    "read" gives them separated by spaces, "largest" the greatest value, "top_left" the first in reading
    order; all three give "none" for a canvas without digits. "count" gives their number. Raises ValueError
    for an unknown kind.
    """
    if kind == "count":
        return str(len(digits))
    if kind not in PHRASINGS:
        raise ValueError(f"unknown kind of question {kind!r}; the kinds are {', '.join(KINDS)}")
    if not digits:
        return NONE
    if kind == "largest":
        return str(max(digits))
    if kind == "top_left":
        return str(digits[0])
    return " ".join(map(str, digits))
