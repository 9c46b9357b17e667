"""Bootstrap intervals: clusters of units (a picture, with all that is asked about it) are drawn with replacement."""

from __future__ import annotations

import numpy as np

from llava_fast.evaluate.task import Task, Units

RESAMPLES = 2000


def resampled(task: Task, units: Units, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, np.ndarray]:
    """Metric -> float64 [resamples], computed anew on each draw; NaN where a draw leaves it undefined. The same seed
    draws the same clusters, so that two evaluations of the same units can be compared draw by draw.
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
    """The bounds of the middle 95% of the values that are numbers."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
