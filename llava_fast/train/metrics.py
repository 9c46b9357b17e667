"""A run's reports: a progress bar, `metrics.jsonl`, TensorBoard and, optionally, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_fast.errors import RecipeError
from llava_fast.storage.files import file_written_whole
from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")
FILE = "metrics.jsonl"
LEFT_OUT = "left_out.txt"  # samples that steps left out, one per line


class Metrics:
    """Reports the steps of a run. Only the first process writes. A resumed run removes the steps that it repeats and
    appends to the same files, so that no step occurs twice.
    """

    def __init__(self, recipe: Recipe, total: int, first: int, writes: bool) -> None:
        self.writes, self.path = writes, recipe.output / FILE
        self._board = self._wandb = None
        if not writes:
            return
        recipe.output.mkdir(parents=True, exist_ok=True)
        if recipe.wandb is not None:
            self._wandb = _wandb(recipe)
        if recipe.tensorboard:
            self._board = _tensorboard(recipe.output / "tensorboard", first)
        cut_after(self.path, first)
        self._file = self.path.open("a", encoding="utf-8")
        self._bar = tqdm(total=total, initial=first, desc="train", unit="step", dynamic_ncols=True)

    def report(self, values: dict[str, Any]) -> None:
        """Report one step: `values` has "step" (counted from 1) and numbers (None: unknown)."""
        if not self.writes:
            return
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=values["step"])
        for problem in values.get("left_out_samples", []):
            logger.warning("step %d leaves out a sample: %s", values["step"], problem)
        loss = "-" if values["loss"] is None else f"{values['loss']:.4f}"
        self._bar.set_postfix(loss=loss, lr=f"{values['lr']:.1e}", refresh=False)
        self._bar.update()

    def flush(self) -> None:
        """Flush the reports to disk; called before each checkpoint."""
        if self.writes:
            os.fsync(self._file.fileno())

    def say_left_out(self) -> None:
        """Log the number of samples that the run's steps left out, including steps before a resume, and write them to
        LEFT_OUT."""
        if not self.writes:
            return
        problems = [problem for step in read_metrics(self.path) for problem in step.get("left_out_samples", [])]
        problems = list(dict.fromkeys(problems))  # a sample may recur in each epoch
        path = self.path.with_name(LEFT_OUT)
        path.unlink(missing_ok=True)
        if problems:
            path.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
            shown = "; ".join(problems[:5]) + "; ..." * (len(problems) > 5)
            logger.warning("%d samples were left out of their steps (%s): %s", len(problems), path, shown)

    def close(self) -> None:
        if self.writes:
            self._file.close()
            self._bar.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps in a metrics file; an incomplete last line is ignored."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            steps.append(json.loads(line))
    return steps


def cut_after(path: Path, step: int) -> None:
    """Truncate a metrics file to the first `step` steps."""
    kept = [values for values in read_metrics(path) if values["step"] <= step]
    with file_written_whole(path) as new:
        new.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")


def _tensorboard(directory: Path, first: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tqdm.write("tensorboard is not installed (pip install 'llava_fast[train]'): metrics.jsonl has the same figures")
        return None
    return SummaryWriter(str(directory), purge_step=first + 1)


def _wandb(recipe: Recipe):
    try:
        import wandb
    except ImportError:
        raise RecipeError("wandb: the package is not installed: pip install wandb, or leave the field out") from None
    return wandb.init(project=recipe.wandb, dir=str(recipe.output), config=recipe.model_dump(mode="json"))
