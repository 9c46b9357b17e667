"""Bootstrap intervals by resampling clusters of units (all questions about an image) with replacement."""

from __future__ import annotations

import numpy as np

from llava_fast.evaluate.task import Task, Units

RESAMPLES = 2000


def resampled(task: Task, units: Units, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """Return {metric: float64 [resamples]}, with NaN for resamples in which the metric is undefined. The same seed
    draws the same clusters, so two evaluations of the same units can be compared per resample.
    """
    rng = np.random.default_rng(seed)
    clusters = int(units.cluster.max()) + 1
    found: dict[str, np.ndarray] = {}
    for number in range(resamples):
        drawn = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters).astype(np.float64)
        for name, value in task.overall(units, drawn[units.cluster]).items():
            found.setdefault(name, np.full(resamples, np.nan))[number] = value
    return found


def middle(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5% and 97.5% quantiles of the values, ignoring NaN."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
