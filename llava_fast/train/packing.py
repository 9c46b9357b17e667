"""How the samples of one optimiser step are shared out: process by process, micro-batch by micro-batch.

The loss is averaged over the whole step, so any split gives the same gradients up to rounding; a good one keeps
processes equally busy.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

Split = list[list[list[int]]]
"""split[process][micro-batch] is a list of sample numbers. Every process has as many micro-batches."""


def split_packed(samples: Sequence[int], rows: np.ndarray, processes: int, most_rows: int) -> Split:
    """Micro-batches of at most `most_rows` rows (a longer sample has one to itself), balanced by rows.

    samples  sample numbers; rows[i] the length of samples[i]. Longest first, each into the emptiest micro-batch that
    it fits (Graham 1969); micro-batches then go in turn to the processes. Deterministic.
    """
    order = sorted(range(len(samples)), key=lambda i: (-int(rows[i]), i))
    each = min(math.ceil(int(np.sum(rows)) / (most_rows * processes)), math.ceil(len(samples) / processes))
    each = max(each, 1)
    while True:
        bins = [(0, number) for number in range(each * processes)]
        held: list[list[int]] = [[] for _ in bins]
        for i in order:
            filled, number = bins[0]
            if held[number] and filled + int(rows[i]) > most_rows:
                break
            heapq.heapreplace(bins, (filled + int(rows[i]), number))
            held[number].append(samples[i])
        else:
            return [held[process::processes] for process in range(processes)]
        each += 1


def split_padded(samples: Sequence[int], processes: int, micro_batch: int) -> Split:
    """Micro-batches of so many samples in the order given, as the original trainers lay them out: a micro-step's
    samples are consecutive, first process first."""
    blocks = [list(samples[start : start + micro_batch]) for start in range(0, len(samples), micro_batch)]
    blocks += [[] for _ in range(-len(blocks) % processes)]
    return [blocks[process::processes] for process in range(processes)]
