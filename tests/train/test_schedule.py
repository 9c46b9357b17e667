"""Which samples a step takes, and how they are shared out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_fast.train.packing import split_packed, split_padded
from llava_fast.train.schedule import Schedule


def shuffled(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(10)


def test_every_epoch_takes_every_sample_once():
    schedule = Schedule.of(shuffled, batch_size=4, epochs=2)
    assert schedule.total == 6
    taken = [schedule.samples(step) for step in range(6)]
    assert [len(each) for each in taken] == [4, 4, 2, 4, 4, 2]
    assert np.array_equal(np.concatenate(taken[:3]), shuffled(0))
    assert np.array_equal(np.concatenate(taken[3:]), shuffled(1))


@pytest.mark.parametrize(("epochs", "steps", "total"), [(1, None, 3), (0.5, None, 2), (2, 5, 5), (1, 100, 3)])
def test_length_of_a_run(epochs, steps, total):
    assert Schedule.of(shuffled, 4, epochs, steps).total == total


@given(st.lists(st.integers(1, 60), min_size=0, max_size=40), st.integers(1, 4), st.integers(20, 80))
def test_packed_split_loses_nothing_and_keeps_to_the_limit(rows, processes, most):
    samples = [100 + number for number in range(len(rows))]
    split = split_packed(samples, np.array(rows, int), processes, most)
    assert len(split) == processes
    assert len({len(each) for each in split}) == 1
    assert len(split[0]) <= max(1, -(-len(rows) // processes))  # no more than one sample in each needs
    batches = [batch for each in split for batch in each]
    assert sorted(number for batch in batches for number in batch) == samples
    for batch in batches:
        assert len(batch) == 1 or sum(rows[number - 100] for number in batch) <= most


def test_packed_split_balances_processes():
    rows = np.random.default_rng(0).integers(50, 2000, 128)
    split = split_packed(range(128), rows, 8, 4096)
    loads = [sum(rows[number] for batch in each for number in batch) for each in split]
    assert max(loads) <= 1.05 * min(loads)
    assert len(split[0]) <= 1.5 * rows.sum() / (8 * 4096) + 1


def test_padded_split_is_the_original_order():
    assert split_padded(range(8), 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert split_padded(range(5), 2, 2) == [[[0, 1], [4]], [[2, 3], []]]
