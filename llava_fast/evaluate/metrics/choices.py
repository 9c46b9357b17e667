"""What a free answer chooses: an option's letter, or yes or no."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STATED = re.compile(r"The answer is ([A-Z])\.")
_SCIENCEQA = re.compile(r"The answer is ([A-Z]).")  # the scorer's pattern, whose last character is any
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_AROUND = [tuple(form.split("X")) for form in "X X. X, X: X) X). (X) (X). :X :X, :X. :X) :X).".split()]


def bare_letter(text: str, count: int) -> str | None:
    """The letter of an answer that is nothing else, of `count` options, or None: SEED-Bench's, as the original LLaVA's
    scripts/convert_seed_for_submission.py compares it."""
    text = text.strip()
    return text if len(text) == 1 and text in LETTERS[:count] else None


def plain_letter(text: str, count: int) -> str | None:
    """The letter of an answer that is nothing else but for case, punctuation and outer spaces: AI2D's, as lmms-eval's
    exact_match with ignore_case and ignore_punctuation."""
    return bare_letter(text.translate(_NO_PUNCTUATION).upper(), count)


def scienceqa_letter(text: str, count: int) -> str | None:
    """The letter of an answer to a question of `count` options, or None, as the original LLaVA's
    llava/eval/eval_science_qa.py: the letter alone, "B. text", or exactly one "The answer is B" with any character
    after it. "B." and "(B)" are none.
    """
    text = text.strip()
    if len(text) == 1:
        return bare_letter(text, count)
    if text[1:3] == ". ":
        return bare_letter(text[0], count)
    stated = _SCIENCEQA.findall(text)
    return bare_letter(stated[0], count) if len(stated) == 1 else None


def stated_letter(text: str, count: int) -> str | None:
    """The letter of the one sentence "The answer is X." in a text about `count` options; None for no such sentence, for
    several, and for a letter without an option."""
    stated = _STATED.findall(text)
    return stated[0] if len(stated) == 1 and stated[0] in LETTERS[:count] else None


def infer_option(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, or None: MMBench's rules without a language model (Liu et al. 2023, arXiv
    2307.06281, section 4; `can_infer` of its evaluator): exactly one letter stands as a word of its own (an "A" among
    more than three words may be an article and does not count), or else exactly one option's text is in the answer.
    """
    words = text.split()
    for before, after in _AROUND:
        named = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        if len(named) == 1 and not (before == after == "" and "A" in words and len(words) > 3):
            return named[0] if named[0] in options else None
    contained = [letter for letter, option in options.items() if str(option).lower() in text.lower()]
    return contained[0] if len(contained) == 1 else None


def pope_answer(text: str) -> str:
    """ "yes" or "no" by POPE's rule (github.com/AoiDragon/POPE, evaluate.py): of the first sentence, commas left out,
    "no" if a word is No, no or not, and "yes" otherwise, whatever it says.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_answer(text: str) -> str | None:
    """ "yes" or "no" by MME's rule (eval_tool/calculation.py): the first four characters hold it; None otherwise."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None
