"""`llava-fast plot`: curves of one or several runs, from their `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_fast.errors import MissingPackageError, TrainingError
from llava_fast.train.metrics import FILE, read_metrics

CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "data_wait": "seconds waited for data",
    "reward_chosen": "reward of the chosen answer",
    "reward_rejected": "reward of the rejected answer",
    "reward_margin": "reward margin",
    "reward_accuracy": "share of pairs with a margin above 0",
}
"""Name in metrics.jsonl -> label of the figures that are drawn if a run has them."""


def read_runs(directories: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The steps of each run by name: the directory's name, or its path if two have the same name.

    Raises TrainingError for a directory without steps in its metrics.jsonl.
    """
    runs = {}
    names = [directory.resolve().name for directory in directories]
    for directory, name in zip(directories, names, strict=True):
        steps = read_metrics(directory / FILE)
        if not steps:
            raise TrainingError(f"{directory / FILE} has no steps: give the `output` directory of a run")
        runs[name if names.count(name) == 1 else str(directory)] = steps
    return runs


def save_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> list[str]:
    """Plot the runs' figures (see `read_runs`) over their steps, with one panel per figure and one line per run; return
    the names of the plotted figures. Unknown values leave gaps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("a picture of curves", "matplotlib", "plot") from None
    steps = [values for run in runs.values() for values in run]
    shown = [key for key in CURVES if any(values.get(key) is not None for values in steps)]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, key in zip(panels, shown, strict=False):
        for run in runs.values():
            values = [math.nan if step.get(key) is None else step[key] for step in run]
            marker = "o" if len(run) == 1 else None  # a line with one point is invisible
            panel.plot([step["step"] for step in run], values, linewidth=1, marker=marker)
        panel.set(title=CURVES[key], xlabel="step")
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.legend(panels[0].lines, list(runs), loc="outside lower center", ncols=min(3, len(runs)))
    figure.savefig(path, dpi=120)
    return shown
