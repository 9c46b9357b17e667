"""Two answers after one prompt: the plan's integers, and the same losses and gradients as two ordinary sequences."""

import numpy as np
import pytest
import torch

from llava_fast.inputs.plan.plan import TextPiece, build_plan
from llava_fast.models.batch import Batch
from tests.support import tiny

IMAGE = tiny.picture(90, 130)
PROMPT = "<image>\nUSER: what is on the table? ASSISTANT:"


def text(start: int, count: int, supervised: bool = True) -> TextPiece:
    return TextPiece(start + np.arange(count) * 7 % 200, np.full(count, supervised))


def test_the_plan_of_a_sequence_with_tails():
    plan = build_plan(
        [[text(20, 3, False), text(40, 1), text(50, 2), text(70, 3)], [text(20, 2, False), text(30, 1), text(31, 1)]],
        tower_rows_per_tile=1,
        branches=[(2, 3), (1, 1)],
    )
    assert plan.lengths == (9, 4)
    assert plan.branches == ((2, 3), (1, 1))
    assert plan.column("position").tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 2, 2]
    # The prefix's last row predicts the first token of each branch.
    assert plan.column("supervised_row").tolist() == [2, 3, 4, 3, 6, 7, 10, 10]
    assert plan.column("supervised_target").tolist() == [40, 50, 57, 70, 77, 84, 30, 31]
    assert plan.column("supervised_branch").tolist() == [0, 1, 1, 2, 2, 2, 1, 2]
    assert plan.column("supervised_sequence").tolist() == [0] * 6 + [1] * 2


def test_an_ordinary_sequence_beside_one_with_tails():
    plan = build_plan([[text(20, 3)], [text(20, 2), text(30, 2)]], tower_rows_per_tile=1, branches=[(), (1, 1)])
    assert plan.column("position").tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert plan.column("supervised_row").tolist() == [0, 1, 3, 4, 4]


@pytest.mark.parametrize(
    ("branches", "layout", "said"), [([(1, 2)], "packed", "no prefix"), ([(1, 1)], "padded", "packed")]
)
def test_refuses(branches, layout, said):
    with pytest.raises(ValueError, match=said):
        build_plan([[text(20, 3)]], 1, layout, branches=branches)


def test_other_columns_travel_with_a_plan():
    plan = build_plan([[text(20, 3)]], tower_rows_per_tile=1)
    more = plan.with_columns({"reference": np.array([[0.5, -2.0]], np.float32).view(np.int32)})
    batch = Batch(torch.zeros(0), more, torch.from_numpy(more.flat))
    assert batch.weight("reference").tolist() == [[0.5, -2.0]]
    assert all(np.array_equal(more.column(name), value) for name, value in plan.columns.items())


def gradients(model, loss) -> dict:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same_gradients(found: dict, expected: dict, limit: float = 1e-5) -> None:
    """Relative to each one's largest value. A shift of all keys changes no attention, so a key's bias has a gradient
    of 0, of which both need only be near (see tests/test_parity_gradients.py)."""
    assert found.keys() == expected.keys()
    assert expected
    floor = 1e-6 * max(float(each.abs().max()) for each in expected.values())
    for name, wanted in expected.items():
        difference, largest = float((found[name] - wanted).abs().max()), float(wanted.abs().max())
        if largest < floor:
            assert float(found[name].abs().max()) < floor, name
            assert name.endswith("k_proj.bias"), name
        else:
            assert difference <= limit * largest, (name, difference / largest)


NAMES = ["next", "next_mistral_window", "onevision", "next_llama3", "next_dynamic_rope", "video"]
SIZES = [(5, 9), (1, 1), (0, 6), (60, 3)]


@pytest.mark.parametrize(
    ("name", "sizes"), [(n, s) for n in NAMES for s in SIZES if n != "next_dynamic_rope" or max(s) < 20]
)
def test_equals_two_ordinary_sequences(name, sizes):
    model, processor = tiny.pair(name).ours, tiny.pair(name).ours.processor
    image = IMAGE if name != "next_dynamic_rope" else tiny.picture(20, 20)
    first, second = text(30, sizes[0]), text(90, sizes[1])

    def batch(answers, branches=()):
        tiles, sequences = [], []
        for of_sequence in answers:
            prompt = processor.pieces(processor.outline({"prompt": PROMPT, "images": [image]}), tiles)
            sequences.append([*prompt, text(60, 2), *of_sequence])
        return Batch.from_prepared(processor.assemble(sequences, tiles, branches=branches))

    # Two pairs, so that branches of one do not meet the other's rows; the answers weigh differently.
    shared = batch([[first, second], [second, first]], [sizes, sizes[::-1]])
    twice = batch([[first], [second], [second], [first]])
    losses = model(shared, logits="none").losses
    weight = torch.tensor([0.5, 1.0, -0.7])[shared.column("supervised_branch").long()]
    both = model(twice, logits="none").losses
    counts = np.bincount(twice.plan.column("sequence")[twice.plan.column("supervised_row")], minlength=4)
    in_prefix = np.concatenate([np.arange(count) < 2 for count in counts])
    of_tail = torch.tensor([1.0, -0.7, 1.0, -0.7]).repeat_interleave(torch.from_numpy(counts))
    weight_twice = torch.where(
        torch.from_numpy(in_prefix), 0.25, of_tail
    )  # the prefix's 0.5, halved: it is there twice

    got, wanted = (losses * weight).sum(), (both * weight_twice).sum()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    branches = shared.plan.column("supervised_branch")
    np.testing.assert_allclose(losses.detach()[branches > 0], both.detach()[~in_prefix], rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, got), gradients(model, wanted))
    model.zero_grad()


def test_dynamic_rope_refuses_answers_that_would_turn_the_prompt():
    pair = tiny.pair("next_dynamic_rope")
    model = pair.ours
    plan = build_plan([[text(20, 50), text(30, 60), text(90, 10)]], tower_rows_per_tile=1, branches=[(60, 10)])
    batch = Batch(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), plan, torch.from_numpy(plan.flat))
    with pytest.raises(ValueError, match="dynamic RoPE"):
        model(batch, logits="none")
