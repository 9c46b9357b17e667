"""How often each source occurs in an epoch, and in which order. Integers only; the same on every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from llava_fast.errors import DataError
from llava_fast.train.data.samples import Source


def epoch_order(
    table_sources: np.ndarray, sources: Sequence[Source], mixing: Literal["concat", "sqrt"], epoch: int, seed: int
) -> np.ndarray:
    """Sample numbers of an epoch, shuffled: int64 [samples in the epoch], the same for the same arguments.

    table_sources   int [n], the source of each sample (`SampleTable.source_of`).
    mixing          "concat": a source of n samples contributes weight * n (rounded), at most its cap. "sqrt": shares
                    are proportional to weight * sqrt(n) and add up to the number of samples; then caps apply.
    No sample of a source is repeated before all have occurred, also across epochs: with weight 0.5, one epoch uses one
    half and the next the other. Raises DataError if no sample is left.
    """
    sizes = np.bincount(table_sources, minlength=len(sources))
    picked = []
    for number, count in enumerate(epoch_counts(sizes, sources, mixing)):
        members = np.flatnonzero(table_sources == number)
        picked.append(members[_turns(len(members), int(count), epoch, [seed, number])])
    order = np.concatenate(picked)
    if not len(order):
        raise DataError("no sample is left in an epoch: raise the weights of its sources")
    return np.random.default_rng([seed, epoch, 0, 2]).permutation(order)  # 2: a stream of random numbers used only here


def epoch_counts(sizes: np.ndarray, sources: Sequence[Source], mixing: Literal["concat", "sqrt"]) -> np.ndarray:
    """int64 [sources]: the number of samples of each source in an epoch. sizes: int [sources], samples in each
    source."""
    weights = np.array([source.weight for source in sources]) * (sizes > 0)
    if mixing == "sqrt":
        shares = weights * np.sqrt(sizes)
        counts = _whole(shares / shares.sum() * sizes.sum()) if shares.any() else np.zeros(len(sizes), np.int64)
    else:
        counts = np.rint(weights * sizes).astype(np.int64)
    return np.minimum(counts, [source.cap or np.iinfo(np.int64).max for source in sources])


def _whole(shares: np.ndarray) -> np.ndarray:
    """Round shares whose sum is an integer to integers with the same sum (largest remainder method)."""
    counts = np.floor(shares).astype(np.int64)
    left = int(np.rint(shares.sum())) - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:left]] += 1
    return counts


def _turns(size: int, count: int, epoch: int, seed: list[int]) -> np.ndarray:
    """The indices of an epoch's `count` samples in a source of `size`: this epoch's part of an infinite sequence of
    shuffles of the source."""
    if not count:
        return np.zeros(0, np.int64)
    start = epoch * count
    rounds = range(start // size, (start + count - 1) // size + 1)
    row = np.concatenate([np.random.default_rng([*seed, each]).permutation(size) for each in rounds])
    return row[start - rounds[0] * size :][:count]
