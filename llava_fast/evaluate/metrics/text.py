"""Metrics of short texts: edit distance, ANLS, ChartQA's relaxed match."""

from __future__ import annotations

from collections.abc import Sequence


def edit_distance(given: Sequence, expected: Sequence) -> int:
    """Levenshtein's: insertions, deletions and substitutions between two sequences."""
    row = list(range(len(expected) + 1))
    for i, mine in enumerate(given, start=1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(expected, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (mine != theirs))
    return row[-1]


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 below the threshold.

    As DocVQA's evaluation (Mathew et al. 2021, arXiv 2007.00398; the challenge's script): both texts in lower case with
    single spaces, the distance divided by the longer text's length before that.
    """
    nearest = 1.0
    given = " ".join(answer.lower().split())
    for reference in references:
        longest = max(len(answer), len(reference))
        distance = edit_distance(given, " ".join(reference.lower().split()))
        nearest = min(nearest, distance / longest if longest else 0.0)
    return 1 - nearest if 1 - nearest >= threshold else 0.0


def relaxed_match(answer: str, reference: str, tolerance: float = 0.05) -> bool:
    """ChartQA's relaxed accuracy (Masry et al. 2022, arXiv 2203.10244, section 5.1): a number within 5% of the
    reference, any other answer equal to it but for case. "12%" is the number 0.12; a reference of 0 is compared as text
    (both as in Qwen-VL's eval_mm/evaluate_vqa.py, which lmms-eval follows).
    """
    number, expected = _number(answer), _number(reference)
    if number is not None and expected:
        return abs(number - expected) / abs(expected) <= tolerance
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
