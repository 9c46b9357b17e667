"""Which samples an optimiser step uses: integers only, independent of the number of processes.

A step's samples depend on the data, the seed and the batch size, so a run that is resumed with another number of
processes neither loses nor repeats a sample. `packing` distributes them to processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """order(epoch): the sample numbers of an epoch, which is cut into steps of `batch_size`; its last step may be
    smaller, as in transformers' Trainer. total: number of steps of the run. left: bool [samples]; other samples are
    missing from their steps and not replaced."""

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
        """The schedule of a run over `epochs` epochs, or `steps` steps if that is fewer."""
        per_epoch = math.ceil(len(order(0)) / batch_size)
        total = math.ceil(per_epoch * epochs)
        return cls(order, batch_size, per_epoch, min(total, steps) if steps else total, left)

    def samples(self, step: int) -> np.ndarray:
        """The sample numbers of a step; steps are counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        numbers = self.order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return numbers if self.left is None else numbers[self.left[numbers]]
