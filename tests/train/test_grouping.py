"""`batching: grouped` groups like the original trainers: groups computed by hand, and invariants for any data.

The groups follow haotian-liu/LLaVA llava/train/llava_trainer.py, worked through on paper."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_fast.errors import RecipeError
from llava_fast.train.data.grouping import grouped_order, word_counts
from llava_fast.train.data.samples import Source, read_sources
from llava_fast.train.parallel import World
from llava_fast.train.run import build_loader, load_model


def deal(words: str, visual: str, batch_size: int, micro_batch: int, seed=(0,)) -> list[list[int]]:
    """Micro-batches of samples 0, 1, 2 ... in that order; `visual` has an x for each with an image."""
    lengths = np.array(words.split(), int)
    kinds = np.array([letter == "x" for letter in visual])
    order = grouped_order(np.arange(len(lengths)), lengths, kinds, batch_size, micro_batch, seed).tolist()
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


def test_a_micro_batch_has_long_and_short_samples():
    # 9 to the first, 8 to the second, 7 to the 8 (8 < 9), which is then full, 1 to the 9.
    assert deal("1 9 7 8", "xxxx", 4, 2) == [[1, 0], [3, 2]]
    # 9, 8 and 5 to one each; 4 to the 5, which is then full; 3 to the 8, 2 to the 9.
    assert deal("9 8 2 5 4 3", "xxxxxx", 6, 2) == [[0, 2], [1, 5], [3, 4]]
    # The longest keeps its micro-batch to itself until the others are full.
    assert deal("30 1 2 3 4 5", "xxxxxx", 6, 3) == [[0, 2, 1], [5, 4, 3]]


def test_equal_lengths_keep_their_order():
    assert deal("5 5 5 5", "xxxx", 4, 2) == [[0, 2], [1, 3]]


def test_a_step_that_is_not_full_is_dealt_in_turn():
    # 5 samples for 4 micro-batches of 2, longest first 0 3 1 4 2: in turn (0 2), (3), (1), (4), and cut in twos again.
    assert deal("9 5 1 7 3", "xxxxx", 8, 2) == [[0, 2], [3, 1], [4]]
    # 4 samples for 4 micro-batches: one each.
    assert deal("9 5 1 7", "xxxx", 8, 2) == [[0, 3], [1, 2]]


def test_text_and_images_do_not_share_a_step_and_the_rest_goes_together():
    # Images 0 2 4 6 8 and texts 1 3 5 7 9, steps of 4: one whole step of each in a random order, then 8 and 9.
    words = "10 1 20 2 30 3 40 4 50 5"
    images, texts, rest = [[6, 0], [4, 2]], [[7, 1], [5, 3]], [[8, 9]]
    found = {str(deal(words, "x.x.x.x.x.", 4, 2, [seed])) for seed in range(20)}
    assert found == {str([*images, *texts, *rest]), str([*texts, *images, *rest])}


def test_the_last_step_of_each_kind_counts_as_left_over_even_if_it_is_full():
    # 8 images and 4 texts: the last steps, 4 images and 4 texts, fill two; the first of them begins the epoch.
    made = deal("1 1 1 1 2 2 2 2 3 3 3 3", "xxxxxxxx....", 4, 2)
    assert made == [[4, 6], [5, 7], [0, 2], [1, 3], [8, 10], [9, 11]]
    # 6 images and 3 texts left over: a step of six, the images, begins, and the texts end.
    made = deal("1 1 1 1 1 1 2 2 2", "xxxxxx...", 6, 2)
    assert made == [[0, 3], [1, 4], [2, 5], [6, 7], [8]]


def test_text_alone_is_dealt_by_lengths_below_zero():
    # The original marks text by a minus, and keeps it where there are no images: the shortest first, and the first
    # micro-batch, whose sum is then the least, is filled before the next.
    assert deal("4 3 2 1", "....", 4, 2) == [[3, 2], [1, 0]]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=80),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_nothing_is_lost_and_kinds_stay_apart(samples, micro_batch, count, seed):
    words = np.array([length for length, _ in samples])
    visual = np.array([has for _, has in samples])
    batch_size = micro_batch * count
    numbers = np.random.default_rng(seed).permutation(len(samples)) + 100
    order = grouped_order(numbers, words, visual, batch_size, micro_batch, [seed])
    assert sorted(order) == list(range(100, 100 + len(samples)))
    assert np.array_equal(order, grouped_order(numbers, words, visual, batch_size, micro_batch, [seed]))
    kinds = visual[np.argsort(numbers)][order - 100]
    mixed = sum(len(set(kinds[start : start + batch_size])) == 2 for start in range(0, len(order), batch_size))
    assert mixed <= 1


def test_lengths_are_words_of_all_turns(tmp_path):
    records = [
        {"conversations": [{"from": "human", "value": "<image>\n what  is\tthis"}, {"from": "gpt", "value": "a cat"}]},
        {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]},
        {"conversations": 3},
        "no sample",
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    assert word_counts(read_sources([Source(path=str(tmp_path / "data.json"))])).tolist() == [6, 3, 0, 0]


def test_a_run_has_these_groups_and_the_mean_of_their_means(make_recipe):
    """22 samples in steps of 8 on two processes: the flat order is cut into micro-batches, process by process."""
    recipe = make_recipe(batch_size=8, micro_batch=2, loss_average="micro_batch", data={"batching": "grouped"})
    model = load_model(recipe, World(0, 1, "cpu"))
    loaders = [build_loader(recipe, model, World(rank, 2, "cpu")) for rank in range(2)]
    schedule = loaders[0].schedule
    for step in range(schedule.total):
        order = schedule.samples(step).tolist()
        blocks = [order[start : start + 2] for start in range(0, len(order), 2)]
        blocks += [[]] * (len(blocks) % 2)
        assert loaders[0].split(step) == [blocks[::2], blocks[1::2]]
    first, second = schedule.order(0), schedule.order(1)
    assert sorted(first) == sorted(second) == list(range(22))
    assert first.tolist() != second.tolist()
    with pytest.raises(RecipeError, match="batch_size that is a multiple of micro_batch"):
        make_recipe(batch_size=8, micro_batch=3, data={"batching": "grouped"})
