"""Bootstrap intervals by resampling clusters of units (all questions about an image) with replacement."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Measure = Callable[[np.ndarray], dict[str, float]]
"""The metrics of units with these weights, float64 [units]."""
RESAMPLES = 2000


def resampled(
    measure: Measure, cluster: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return {metric: float64 [resamples]}, with NaN for resamples in which the metric is undefined. cluster int64
    [units]: the cluster of each. The same seed draws the same clusters, so two evaluations of the same units can be
    compared per resample.
    """
    rng = np.random.default_rng(seed)
    names, cluster = np.unique(cluster, return_inverse=True)
    clusters = len(names)
    found: dict[str, np.ndarray] = {}
    for number in range(resamples):
        drawn = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters).astype(np.float64)
        for name, value in measure(drawn[cluster]).items():
            found.setdefault(name, np.full(resamples, np.nan))[number] = value
    return found


def middle(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5% and 97.5% quantiles of the values, ignoring NaN."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
