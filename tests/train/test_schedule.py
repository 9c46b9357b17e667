"""Which samples each step uses, and how they are distributed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_fast.models.decoders.llama import LlamaConfig
from llava_fast.train.data.packing import split_packed, split_padded
from llava_fast.train.data.schedule import Schedule
from llava_fast.train.estimate.flops import sequence_flops


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
    lengths = np.array(rows, int)
    split = split_packed(samples, lengths, lengths.astype(float) ** 2, processes, most)
    assert len(split) == processes
    assert len({len(each) for each in split}) == 1
    assert len(split[0]) <= max(1, -(-len(rows) // processes))  # no more than one sample in each needs
    batches = [batch for each in split for batch in each]
    assert sorted(number for batch in batches for number in batch) == samples
    for batch in batches:
        assert len(batch) == 1 or sum(rows[number - 100] for number in batch) <= most


def test_packed_split_balances_processes():
    decoder = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=2,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_positions=4096,
        rms_norm_eps=1e-5,
    )
    rng = np.random.default_rng(0)
    rows = np.where(rng.random(128) < 0.2, rng.integers(3000, 4000, 128), rng.integers(50, 700, 128))
    costs = sequence_flops(decoder, rows)
    assert costs[rows.argmax()] / costs[rows.argmin()] > 1.2 * rows.max() / rows.min()  # attention counts

    def busiest(balanced_by: np.ndarray) -> tuple[float, float]:
        """The largest load over the mean: of a process, and in one turn (the mean over turns)."""
        split = split_packed(range(128), rows, balanced_by, 8, 4096)
        assert len(split[0]) <= 1.5 * rows.sum() / (8 * 4096) + 1
        loads = np.array([[costs[batch].sum() for batch in each] for each in split])
        turns = loads.max(0).sum() / loads.mean(0).sum()  # processes wait for each other at each micro-batch
        return loads.sum(1).max() / loads.sum(1).mean(), turns

    by_costs, by_rows = busiest(costs), busiest(rows)
    assert by_costs[0] < 1.02
    assert by_costs[1] < 1.03
    assert by_costs[0] < by_rows[0]
    assert by_costs[1] < by_rows[1]


def test_padded_split_is_the_original_order():
    assert split_padded(range(8), 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert split_padded(range(5), 2, 2) == [[[0, 1], [4]], [[2, 3], []]]
