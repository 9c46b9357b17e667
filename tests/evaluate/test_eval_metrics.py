"""Metrics on vectors worked out by hand."""

import pytest

from llava_fast.evaluate.metrics.choices import (
    bare_letter,
    infer_option,
    mme_answer,
    plain_letter,
    pope_answer,
    scienceqa_letter,
    stated_letter,
)
from llava_fast.evaluate.metrics.text import anls, edit_distance, relaxed_match
from llava_fast.evaluate.metrics.vqa import (
    CONTRACTIONS,
    agreement,
    evalai_accuracy,
    normalise,
    normalise_evalai,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog", "dog"),  # case, article, spaces
        ("an apple, a pear", "apple pear"),  # ", " is beside a space, so the comma vanishes
        ("red/white", "red white"),  # no mark beside a space: it becomes one
        ("red / white", "red white"),
        ("1,000 people", "1000 people"),  # a comma between digits: all marks vanish
        ("1,000-2,000", "10002000"),  # also the hyphen: the scorer's oddity
        ("2.5", "2.5"),
        ("3.", "3"),
        ("e.g.", "eg"),
        ("Two dogs and none", "2 dogs and 0"),
        ("eleven", "eleven"),  # number words end at ten
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # only one apostrophe may be missing
        ("its 2:50 pm", "its 2:50 pm"),  # colons stay
        ("girl's", "girl's"),
        ("somebody'd", "somebodyd"),  # the scorer's slip
        ("line\nbreak", "line break"),
    ],
)
def test_normalisation(text, expected):
    assert normalise(text) == expected


def test_the_table_of_contractions():
    """The official table has 120 entries; 2 map a word to itself and 4 have capitals, which no text in lower case
    matches: 114 are left."""
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["oclock"] == "o'clock"
    assert "its" not in CONTRACTIONS
    assert "shes" not in CONTRACTIONS
    assert all(key != word for key, word in CONTRACTIONS.items())


def test_evalai_splits_possessives():
    assert normalise_evalai("John's car?") == "john 's car"
    assert normalise_evalai("1,000") == "1000"
    assert normalise_evalai("a,b") == "ab"  # its commas vanish first: "a,b" is one word, no article


def test_leave_one_out():
    """Of ten humans k say it. Leaving out one of the k: k - 1 others; leaving out one of the rest: k.
    k=1: (1*0/3 + 9*1/3)/10 = 0.3; k=2: (2*1/3 + 8*2/3)/10 = 0.6; k=3: (3*2/3 + 7*1)/10 = 0.9; k=4: all 1."""
    for count, expected in [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]:
        humans = ["yes"] * count + [f"other {n}" for n in range(10 - count)]
        assert agreement("yes", humans) == pytest.approx(expected)


def test_vqa_normalises_where_humans_disagree():
    assert vqa_accuracy("The dog.", ["dog"] * 9 + ["cat"]) == 1.0
    assert vqa_accuracy("The dog.", ["dog"] * 10) == 0.0  # as they are, where all say the same
    assert vqa_accuracy(" dog\n", ["dog"] * 10) == 1.0
    assert evalai_accuracy("The dog.", ["dog"] * 10) == 1.0
    assert evalai_accuracy("two", ["2", "2", *["three"] * 8]) == pytest.approx(0.6)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3  # k-s, e-i, +g
    assert edit_distance([], ["a", "b"]) == 2
    assert edit_distance(["1", "2"], ["2"]) == 1


def test_anls():
    """ "helo" to "hello": 1 insertion over 5 characters: 1 - 1/5. "abc" to "xyz": similarity 0, below the threshold.
    "ab" to "abcd": 2 of 4: exactly 0.5, kept. The nearest reference counts."""
    assert anls("helo", ["hello"]) == pytest.approx(0.8)
    assert anls("abc", ["xyz"]) == 0.0
    assert anls("ab", ["abcd"]) == 0.5
    assert anls("a", ["abc"]) == 0.0  # 1 - 2/3
    assert anls("  HELLO ", ["hello"]) == 1.0  # distance after case and spaces
    assert anls("helo", ["xyz", "hello"]) == pytest.approx(0.8)
    assert anls("", ["a"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("105", "100", True),  # 5/100
        ("105.1", "100", False),
        ("95", "100", True),
        ("-95", "-100", True),
        ("12%", "0.12", True),
        ("12", "12%", False),  # 12 against 0.12
        ("0", "0", True),
        ("0.0", "0", False),  # a reference of 0 is compared as text
        ("Blue", "blue", True),
        ("blue.", "blue", False),
        ("2019", "2020", True),  # a year is a number
    ],
)
def test_relaxed(answer, reference, right):
    assert relaxed_match(answer, reference) is right


@pytest.mark.parametrize(
    ("text", "scienceqa", "seed", "ai2d"),
    [
        ("B", "B", "B", "B"),
        (" B\n", "B", "B", "B"),
        ("B. a cat", "B", None, None),
        ("B.", None, None, "B"),  # three characters are needed for "B. "
        ("(B)", None, None, "B"),
        ("(B) a cat", None, None, None),
        ("B) a cat", None, None, None),
        ("B: a cat", None, None, None),
        ("The answer is B.", "B", None, None),
        ("The answer is B, because", "B", None, None),  # the pattern's last character is any
        ("The answer is B", None, None, None),
        ("The answer is B. The answer is C.", None, None, None),
        ("E", None, None, None),  # four options
        ("E. a cat", None, None, None),
        ("A cat", None, None, None),
        ("b", None, None, "B"),
        ("B.5", None, None, None),
        ("AB", None, None, None),
        ("", None, None, None),
    ],
)
def test_letters_as_their_scorers_read_them(text, scienceqa, seed, ai2d):
    assert scienceqa_letter(text, 4) == scienceqa
    assert bare_letter(text, 4) == seed
    assert plain_letter(text, 4) == ai2d


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A) is too far north. The answer is B.", "B"),
        ("The answer is B.", "B"),
        ("A", None),
        ("A. West Virginia", None),
        ("The answer is B, I think.", None),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is E.", None),  # four options
    ],
)
def test_stated_letter(text, letter):
    assert stated_letter(text, 4) == letter


OPTIONS = {"A": "teddy bear", "B": "rabbit", "C": "cat", "D": "dog"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("C. cat", "C"),
        ("(C) cat", "C"),
        ("The answer is (C).", "C"),
        ("Answer: C", "C"),
        ("a cute Teddy Bear", "A"),
        ("cat and dog", None),  # two options' texts
        ("B or C", None),
        ("A rabbit is in it", "B"),  # "A" among more than three words may be an article
        ("A", "A"),
        ("E", None),
        ("spider", None),
    ],
)
def test_infer_option(text, letter):
    assert infer_option(text, OPTIONS) == letter


def test_yes_and_no():
    assert pope_answer("No, there is not.") == "no"
    assert pope_answer("Yes. But no dog.") == "yes"  # the first sentence alone
    assert pope_answer("There is no dog") == "no"
    assert pope_answer("nothing") == "yes"  # whatever else it says
    assert mme_answer("Yes, it is") == "yes"
    assert mme_answer(" NO") == "no"
    assert mme_answer("It is not") is None  # "it i"
    assert mme_answer("Know") == "no"  # within the first four characters
