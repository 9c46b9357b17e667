"""A checkpoint may spell its image token otherwise than <image>, as InternVL does: ids and labels stay the same."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from llava_fast.inputs.plan.plan import TextPiece
from tests.support import tiny

TURNS = [
    {"role": "user", "content": "<image> what is <image>?"},
    {"role": "assistant", "content": "the hello"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<i>"])
@pytest.mark.parametrize("labels", [False, True])
def test_ids_and_labels_are_those_of_the_usual_spelling(token, labels):
    usual = tiny.pair("next").ours.processor
    tokenizer = copy.deepcopy(usual.tokenizer)
    tokenizer.add_tokens([token], special_tokens=True)
    other = replace(usual, tokenizer=tokenizer, image_token_id=tokenizer.convert_tokens_to_ids(token))
    request = {"messages": TURNS, "images": [tiny.picture(60, 90), tiny.picture(30, 30)]}
    expected, found = usual.outline(request, labels), other.outline(request, labels)
    assert [type(part) for part in found] == [type(part) for part in expected]
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(mine, TextPiece):
            assert np.array_equal(mine.ids, theirs.ids)
            assert np.array_equal(mine.supervised, theirs.supervised)
    assert not labels or any(part.supervised.any() for part in found if isinstance(part, TextPiece))
