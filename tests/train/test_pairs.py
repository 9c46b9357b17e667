"""Preference data: its formats, errors, and how two answers share a sequence."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import llava_fast
from llava_fast.errors import DataError
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece
from llava_fast.models.batch import Batch
from llava_fast.train.data.lengths import measure
from llava_fast.train.data.pairs import PairBatches, read_pairs, shared_pair
from llava_fast.train.data.samples import Source
from llava_fast.train.objectives.dpo import preference_losses
from llava_fast.train.objectives.reference import answer_log_probs
from tests.support import tiny

PAIR = {"id": "p0", "image": "a.png", "prompt": "what is it?", "chosen": "a red cup", "rejected": "a red table"}


@pytest.fixture(scope="module")
def model(tiny_next):
    return llava_fast.load(tiny_next, chat_template="vicuna_v1")


@pytest.fixture
def table(tmp_path):
    """Answers of the pairs given, beside the pictures a.png and b.png."""
    for name, size in (("a.png", (70, 100)), ("b.png", (50, 40))):
        Image.fromarray(tiny.picture(*size)).save(tmp_path / name)

    def read(*pairs):
        (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
        return read_pairs([Source(path=str(tmp_path / "pairs.jsonl"))])

    return read


def turns(sample) -> list[str]:
    return [message["content"] for message in sample.request["messages"]]


@pytest.mark.parametrize(
    ("change", "first", "images", "video"),
    [
        ({}, "<image>\nwhat is it?", 1, False),
        ({"prompt": "what is <image> it?"}, "<image>\nwhat is  it?", 1, False),
        ({"image": None}, "what is it?", 0, False),
        ({"image": ["a.png", "b.png"]}, "<image>\n<image>\nwhat is it?", 2, False),
        ({"image": None, "images": ["a.png"]}, "<image>\nwhat is it?", 1, False),
        ({"image": None, "video": "v.mp4"}, "<video>\nwhat is it?", 0, True),
        ({"image": None, "video": "v.mp4", "prompt": "<image>\nwhat is it?"}, "<video>\nwhat is it?", 0, True),
        ({"chosen": None, "answer": "a red cup"}, "<image>\nwhat is it?", 1, False),
        ({"chosen": [{"role": "assistant", "content": "a red cup"}]}, "<image>\nwhat is it?", 1, False),
        ({"prompt": [{"from": "human", "value": "what is it?"}]}, "<image>\nwhat is it?", 1, False),
    ],
)
def test_forms(table, change, first, images, video):
    answers = table(PAIR | change)
    assert len(answers) == 2
    assert turns(answers[0]) == [first, "a red cup"]
    assert turns(answers[1]) == [first, "a red table"]
    assert len(answers[0].request["images"]) == images
    assert ("video" in answers[0].request) == video
    assert answers[0].name == answers[1].name == answers.name(1) == "pairs.jsonl[0] (id p0)"


def test_earlier_turns_come_before_the_answers(table, model):
    said = [("human", "hello"), ("gpt", "a table"), ("human", "what is it?")]
    answers = table(PAIR | {"prompt": [{"from": who, "value": text} for who, text in said]})
    assert turns(answers[0]) == ["<image>\nhello", "a table", "what is it?", "a red cup"]
    pair = shared_pair(model.processor, answers[0].request, answers[1].request, [])
    supervised = [p for p in (*pair.prefix, *pair.branches) if isinstance(p, TextPiece) and p.supervised is not None]
    learnt = "".join(model.tokenizer.decode(p.ids[p.supervised]) for p in supervised)
    assert learnt == " a red cup</s> table</s>"  # not the answer of the turn before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": None}, "no text under 'answer'"),
        ({"chosen": 3}, "no text under 'chosen'"),
        ({"rejected": " "}, "no text under 'rejected'"),
        ({"rejected": "a red cup"}, "two answers are the same"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": [{"from": "gpt", "value": "x"}]}, "end with a turn from 'human'"),
        ({"prompt": "<image> <image> what"}, "2 <image> placeholders and it has 1 image"),
        ({"image": 7}, "must be a path"),
    ],
)
def test_what_is_wrong_is_said_by_name(table, change, said):
    answers = table(PAIR | change)
    with pytest.raises(DataError, match=said) as raised:
        answers[1]
    assert str(raised.value).startswith("pairs.jsonl[0] (id p0): ")


def test_a_pair_that_is_no_object(table):
    with pytest.raises(DataError, match=r"pairs.jsonl\[0\]: a pair must be an object"):
        table("text")[0]


def whole(pieces) -> list:
    """Token ids, and None for an image."""
    parts = [[None] if isinstance(piece, VisualPiece) else piece.ids.tolist() for piece in pieces]
    return [each for part in parts for each in part]


def test_what_both_answers_share_is_there_once(table, model):
    answers = table(PAIR)
    tiles: list = []
    pair = shared_pair(model.processor, answers[0].request, answers[1].request, tiles)
    assert len(tiles) == 1  # the image was opened once
    for which in (0, 1):
        outline = model.processor.outline(answers[which].request, labels=True)
        assert whole([*pair.prefix, pair.branches[which]]) == whole(model.processor.pieces(outline, []))
    assert "a red" in model.tokenizer.decode(pair.prefix[-1].ids)
    assert pair.branches[0].ids[0] != pair.branches[1].ids[0]


def test_one_answer_may_begin_the_other(table, model):
    answers = table(PAIR | {"chosen": "a red", "rejected": "a red cup"})
    pair = shared_pair(model.processor, answers[0].request, answers[1].request, [])
    assert model.tokenizer.decode(pair.branches[0].ids) == "</s>"


def test_measured_rows_hold_a_pair(table, model):
    answers = table(PAIR, PAIR | {"image": "b.png", "chosen": "nothing at all"}, PAIR | {"rejected": None})
    alone, shared = answers.rows(measure(answers, model.processor, "answers", 0, progress=False))
    assert list(alone.problems) == [2]
    assert "no text under 'rejected'" in alone.problems[2]
    for number in (0, 1):
        prepared, _, _ = PairBatches(answers, model.processor)[[number]]
        rows, branches = prepared.plan.lengths[0], prepared.plan.branches[0]
        assert shared.visual[number] + shared.text[number] - 6 <= rows <= shared.visual[number] + shared.text[number]
        assert alone.visual[number] + alone.text[number] == rows - min(branches)


def test_errors_name_the_pair(table, model):
    answers = table(PAIR | {"image": "gone.png"})
    _, names, left_out = PairBatches(answers, model.processor)[[0]]
    assert not names
    assert [number for number, _ in left_out] == [0]
    assert re.match(r"pairs.jsonl\[0\] \(id p0\): .*gone.png", left_out[0].problem)


def test_log_probabilities_are_those_of_ordinary_sequences(table, model):
    pairs = [PAIR, PAIR | {"image": None, "chosen": "hello", "rejected": "hello a table"}]
    answers = table(*pairs)
    references = np.array([[-1.5, 2.0], [0.25, 4.0]], np.float32)
    prepared, names, _ = PairBatches(answers, model.processor, references)[[1, 0]]
    batch = Batch.from_prepared(prepared)
    assert len(names) == 2
    assert batch.weight("reference").tolist() == references[::-1].tolist()
    with torch.no_grad():
        found, tokens = answer_log_probs(model(batch, logits="none").losses, batch.plan)
        for row, number in enumerate((1, 0)):
            for which in (0, 1):
                one = model.prepare([answers[2 * number + which].request], labels=True)
                losses = model(one, logits="none").losses
                assert int(tokens[row, which]) == len(losses)
                torch.testing.assert_close(found[row, which], -losses.sum(), rtol=1e-5, atol=1e-5)


def test_the_loss_by_hand():
    rewards = torch.tensor([[1.0, -1.0], [0.5, 0.5]])
    expected = [np.log1p(np.exp(-2.0)), np.log(2.0)]
    np.testing.assert_allclose(preference_losses(rewards), expected, rtol=1e-6)
    smooth = 0.9 * np.log1p(np.exp(-2.0)) + 0.1 * np.log1p(np.exp(2.0))
    np.testing.assert_allclose(preference_losses(rewards, 0.1)[0], smooth, rtol=1e-6)
