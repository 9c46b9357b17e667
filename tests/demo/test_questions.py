"""Questions and answers of the digits demo."""

import numpy as np
import pytest

from llava_fast.demo import KINDS, PHRASINGS, answer, ask


@pytest.mark.parametrize(
    ("digits", "expected"),
    [
        ([3, 7, 1], {"read": "3 7 1", "count": "3", "largest": "7", "top_left": "3"}),
        ([0], {"read": "0", "count": "1", "largest": "0", "top_left": "0"}),
        ([], {"read": "none", "count": "0", "largest": "none", "top_left": "none"}),
    ],
)
def test_answers(digits, expected):
    assert {kind: answer(kind, digits) for kind in KINDS} == expected


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="the kinds are read"):
        answer("sum", [1])


def test_every_phrasing_is_asked_and_belongs_to_one_kind():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        assert {ask(rng, kind) for _ in range(60)} == set(PHRASINGS[kind])
    phrasings = [text for texts in PHRASINGS.values() for text in texts]
    assert len(phrasings) == len(set(phrasings))
