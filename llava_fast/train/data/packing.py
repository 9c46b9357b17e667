"""Distributes the samples of one optimiser step to processes and micro-batches.

The loss is averaged over the whole step, so every split gives the same gradients up to rounding; a good split balances
the work of the processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Split = list[list[list[int]]]
"""split[process][micro-batch] is a list of sample numbers. All processes have the same number of micro-batches."""


def split_packed(samples: Sequence[int], rows: np.ndarray, costs: np.ndarray, processes: int, most_rows: int) -> Split:
    """Micro-batches of at most `most_rows` rows, balanced by cost; a longer sample gets a micro-batch of its own.

    samples  sample numbers; rows[i] and costs[i]: length and cost (in any unit) of samples[i].
    Costliest first, each sample is put into the cheapest micro-batch with room for it (Graham 1969). Micro-batches that
    run at the same time on different processes get similar costs; the costliest is assigned to the process with the
    least work so far. Deterministic.
    """
    order = sorted(range(len(samples)), key=lambda i: (-float(costs[i]), i))
    most = max(math.ceil(len(samples) / processes), 1)  # enough for one sample each
    each = min(max(math.ceil(int(np.sum(rows)) / (most_rows * processes)), 1), most)
    while (held := _filled(order, rows, costs, each * processes, most_rows)) is None:
        each = min(each + max(each // 50, 1), most)  # a whole data set needs thousands
    busy = [float(np.sum(costs[batch])) for batch in held]
    by_load = sorted(range(len(held)), key=lambda number: (-busy[number], number))
    split: Split = [[] for _ in range(processes)]
    load = [0.0] * processes
    for turn in range(0, len(held), processes):
        idlest = sorted(range(processes), key=lambda process: (load[process], process))
        for process, number in zip(idlest, by_load[turn : turn + processes], strict=True):
            split[process].append([samples[i] for i in held[number]])
            load[process] += busy[number]
    return split


def _filled(
    order: list[int], rows: np.ndarray, costs: np.ndarray, count: int, most_rows: int
) -> list[list[int]] | None:
    """Indices of the samples in a given number of micro-batches; None if they do not fit."""
    held: list[list[int]] = [[] for _ in range(count)]
    busy, filled = np.zeros(count), np.zeros(count, np.int64)
    for i in order:
        fits = (filled == 0) | (filled + rows[i] <= most_rows)
        if not fits.any():
            return None
        number = int(np.where(fits, busy, np.inf).argmin())
        held[number].append(i)
        busy[number] += costs[i]
        filled[number] += rows[i]
    return held


def split_padded(samples: Sequence[int], processes: int, micro_batch: int) -> Split:
    """Micro-batches of `micro_batch` samples in the given order, assigned as in the original trainers: the samples of
    all processes in one micro-step are consecutive, first process first."""
    blocks = [list(samples[start : start + micro_batch]) for start in range(0, len(samples), micro_batch)]
    blocks += [[] for _ in range(-len(blocks) % processes)]
    return [blocks[process::processes] for process in range(processes)]
