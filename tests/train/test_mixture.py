"""Epochs: how often each source is seen, and that nothing is lost, repeated or left to chance."""

from __future__ import annotations

import numpy as np
import pytest

from llava_fast.errors import DataError
from llava_fast.train.data.mixture import epoch_counts, epoch_order
from llava_fast.train.data.samples import Source


def mixed(*options):
    return [Source(path="a.json", **each) for each in options]


def table_of(*sizes):
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)


def test_an_epoch_is_a_shuffle_of_everything():
    table, sources = table_of(30, 70), mixed({}, {})
    orders = [epoch_order(table, sources, "concat", epoch, seed=1) for epoch in range(2)]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order) == list(range(100))
        assert list(order) != sorted(order)
        assert 5 < (table[order[:50]] == 0).sum() < 25
    assert list(orders[0]) != list(orders[1])
    assert list(table[orders[0]]) != list(table[orders[1]])
    assert list(orders[0]) != list(epoch_order(table, sources, "concat", 0, seed=2))
    assert list(orders[0]) == list(epoch_order(table, sources, "concat", 0, seed=1))


def test_weights_take_turns():
    table, sources = table_of(10, 10, 10), mixed({"weight": 0.5}, {"weight": 2}, {"weight": 0})
    first, second = (epoch_order(table, sources, "concat", epoch, 0) for epoch in range(2))
    halves = [set(order[table[order] == 0]) for order in (first, second)]
    assert [len(half) for half in halves] == [5, 5]
    assert halves[0] | halves[1] == set(range(10))
    assert (np.bincount(first, minlength=30)[10:20] == 2).all()
    assert len(first) == 25


def test_uneven_weights_never_favour_a_sample():
    table, sources = table_of(7), mixed({"weight": 0.6})
    seen = np.zeros(7, int)
    for epoch in range(20):
        order = epoch_order(table, sources, "concat", epoch, 0)
        assert len(order) == 4
        seen += np.bincount(order, minlength=7)
        assert np.ptp(seen) <= 1


def test_caps():
    table, sources = table_of(100, 10), mixed({"cap": 25}, {"cap": 25})
    order = epoch_order(table, sources, "concat", 0, 0)
    assert np.bincount(table[order]).tolist() == [25, 10]


def test_square_root_mixing():
    counts = epoch_counts(np.array([900, 100]), mixed({}, {}), "sqrt")
    assert counts.tolist() == [750, 250]
    order = epoch_order(table_of(900, 100), mixed({}, {}), "sqrt", 0, 0)
    assert np.bincount(order, minlength=1000)[900:].tolist() != [3] * 100  # 250 among 100: two or three times each
    assert set(np.bincount(order, minlength=1000)[900:]) == {2, 3}
    assert epoch_counts(np.array([900, 100]), mixed({"cap": 50}, {"weight": 3}), "sqrt").tolist() == [50, 500]
    assert epoch_counts(np.array([5, 3, 3]), mixed({}, {}, {}), "sqrt").sum() == 11


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match="no sample is left"):
        epoch_order(table_of(3), mixed({"weight": 0}), "sqrt", 0, 0)
    with pytest.raises(DataError, match="no sample is left"):
        epoch_order(table_of(3), mixed({"weight": 0.1}), "concat", 0, 0)
