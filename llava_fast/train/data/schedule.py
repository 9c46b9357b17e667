"""Which samples an optimiser step takes: integers alone, the same for any number of processes.

A step's samples depend on the data, the seed and the batch size, so a run that is resumed with another number of
processes neither loses nor repeats a sample. `packing` distributes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """`order(epoch)` gives the sample numbers of an epoch; steps of `batch_size` are cut from it, the last of an epoch
    smaller, as transformers' Trainer does. `total` is the number of steps of the whole run. Samples that are not `left`
    (bool [samples]) are missing from their steps, and no other sample takes their place."""

    order: Callable[[int], np.ndarray]
    batch_size: int
    steps_per_epoch: int
    total: int
    left: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        order: Callable[[int], np.ndarray],
        batch_size: int,
        epochs: float,
        steps: int | None = None,
        left: np.ndarray | None = None,
    ) -> Schedule:
        """A run over so many epochs, or `steps` steps if that is fewer."""
        per_epoch = math.ceil(len(order(0)) / batch_size)
        total = math.ceil(per_epoch * epochs)
        return cls(order, batch_size, per_epoch, min(total, steps) if steps else total, left)

    def samples(self, step: int) -> np.ndarray:
        """Sample numbers of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        numbers = self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return numbers if self.left is None else numbers[self.left[numbers]]
