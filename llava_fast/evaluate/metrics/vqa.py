"""VQA accuracy and its normalisation of answers.

After the official scorer (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, described at
visualqa.org/evaluation.html), and after EvalAI's, which Pythia's M4C and the original LLaVA use for TextVQA
(llava/eval/m4c_evaluator.py). Their oddities are kept, because published figures contain them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
"""The scorer's contractions. Its table maps each of them, spelled with one apostrophe missing, to this form."""

CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in CONTRACTED
    for at, character in enumerate(word)
    if character == "'" and word != "i'd've"  # the table has "Id've", which no text in lower case matches
} | {"somebody'd": "somebodyd"}  # the scorer's own slip

NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # "3." and "e.g." lose theirs, "2.5" keeps it


def normalise(text: str) -> str:
    """An answer as the VQA scorer compares it: punctuation, case, number words, articles and contractions."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _words(_without_punctuation(text))


def normalise_evalai(text: str) -> str:
    """The same with EvalAI's first step: lower case, no comma or question mark, "'s" as a word of its own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(text)


def _without_punctuation(text: str) -> str:
    """Each mark vanishes if it stands beside a space anywhere in the text, or if the text has a comma between digits;
    otherwise it becomes a space.
    """
    joined = _DIGITS_COMMA.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        vanishes = joined or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", found)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, humans: Sequence[str]) -> float:
    """How far humans agree with an answer, 0 to 1: for each human in turn, the others who gave this answer, a third for
    each and at most 1; then the mean. Texts are compared as they are.
    """
    same = sum(human == answer for human in humans)
    others = len(humans) - same
    return (same * min(1.0, (same - 1) / 3) + others * min(1.0, same / 3)) / len(humans)


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """VQA accuracy of one answer, 0 to 1. As in the official scorer, texts are normalised only where the humans do not
    all say the same.
    """
    humans = [human.replace("\n", " ").replace("\t", " ").strip() for human in humans]
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(humans)) > 1:
        return agreement(normalise(answer), [normalise(human) for human in humans])
    return agreement(answer, humans)


def evalai_accuracy(answer: str, humans: Sequence[str]) -> float:
    """VQA accuracy with EvalAI's normalisation of both sides, always: TextVQA's."""
    return agreement(normalise_evalai(answer), [normalise_evalai(human) for human in humans])
