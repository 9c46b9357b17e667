"""The original trainers' batches: text-only samples separate from those with images, and each micro-batch with long and
short samples.

Source of the method: haotian-liu/LLaVA llava/train/llava_trainer.py (group_by_modality_length) and `modality_lengths`
of its train.py, also in LLaVA-VL/LLaVA-NeXT. Integers only; the same on every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_fast.train.data.samples import SampleTable


def word_counts(table: SampleTable) -> np.ndarray:
    """The original's length measure: int64 [samples], the whitespace-separated words in all turns of a sample."""
    return np.array([_words(table.value(number)) for number in range(len(table))], np.int64)


def grouped_order(
    numbers: np.ndarray, words: np.ndarray, visual: np.ndarray, batch_size: int, micro_batch: int, seed: Sequence[int]
) -> np.ndarray:
    """An epoch's order, in which each `micro_batch` consecutive samples are one of the original's micro-batches.

    numbers     sample numbers in random order; words[i] is the length of numbers[i] (see `word_counts`), visual[i]
                whether it has images or a video.
    batch_size  samples per optimiser step: the original's devices x accumulation x micro-batch.
    seed        for the order of steps.
    Steps of each kind (with and without images) are cut from the random order. The remainders of both kinds (a whole
    step, if a kind has no remainder) are combined: if they fill a step, it comes first, and the rest comes last. Data
    of a single kind keeps its steps in the random order.
    """
    kinds = [np.flatnonzero(kind) for kind in (visual, ~visual)]
    lengths = words if all(len(places) for places in kinds) else np.where(visual, words, -words)  # as in the original
    cut = [
        [_dealt(places[start : start + batch_size], lengths, micro_batch, batch_size) for start in starts]
        for places in kinds
        if len(starts := range(0, len(places), batch_size))
    ]
    if len(cut) == 1:
        return numbers[np.concatenate(cut[0])]
    steps = [step for kind in cut for step in kind[:-1]]
    left = np.concatenate([kind[-1] for kind in cut])
    order = [steps[i] for i in np.random.default_rng(seed).permutation(len(steps))]
    if len(left) >= batch_size:
        order, left = [left[:batch_size], *order], left[batch_size:]
    return numbers[np.concatenate([*order, left])]


def _dealt(step: np.ndarray, lengths: np.ndarray, micro_batch: int, batch_size: int) -> np.ndarray:
    """The indices of one step, micro-batch after micro-batch. Longest first, each sample is assigned to the micro-batch
    with the smallest sum so far, or round-robin if the step does not fill all micro-batches equally.
    """
    count = batch_size // micro_batch
    step = step[np.argsort(-lengths[step], kind="stable")]
    if len(step) % count:
        return np.concatenate([step[first::count] for first in range(count)])
    held: list[list[int]] = [[] for _ in range(count)]
    total = [0] * count
    for place in step.tolist():
        free = [number for number in range(count) if len(held[number]) < len(step) // count]
        least = min(free, key=total.__getitem__)
        held[least].append(place)
        total[least] += int(lengths[place])
    return np.array([place for each in held for place in each], np.int64)


def _words(value: Any) -> int:
    turns = (value.get("conversations") or value.get("messages")) if isinstance(value, dict) else None
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get("value", turn.get("content")) for turn in turns if isinstance(turn, dict)]
    return sum(len(text.split()) for text in texts if isinstance(text, str))
