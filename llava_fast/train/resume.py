"""Resuming a run: its state in a checkpoint, and checks that recipe and data have not changed."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from llava_fast.errors import TrainingError
from llava_fast.train.checkpoint import RunCheckpoints
from llava_fast.train.data.loader import Loader
from llava_fast.train.objective import Objective
from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")
RECIPE_FILE = "recipe.yaml"  # in a run's output: the recipe of its last start
_KEPT = ("model", "trainable", "lora", "quantize", "optimizer")  # fields that must not change when a run is resumed


@dataclass
class RunState:
    """The parts of a run that are stored in a checkpoint. recent: the last losses."""

    recipe: Recipe
    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    loader: Loader
    objective: Objective
    recent: deque[float]

    def at(self, step: int) -> dict[str, Any]:
        """The state of the run after `step` steps. Frozen weights are not included: they are those of the recipe's
        model."""
        model, optimizer = get_state_dict(
            self.model, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
        )
        objective = self.objective.state()
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "run": {"step": step, "data": self._data_mark(), "recent": list(self.recent)},
            **({"objective": objective} if objective else {}),
        }

    def resume(self, checkpoints: RunCheckpoints, says: bool) -> int:
        """Load the newest checkpoint; return its number of steps, 0 without one. says: whether this process logs
        changes of the recipe.

        Raises TrainingError if recipe or data do not match the run.
        """
        steps = checkpoints.steps()
        if not steps:
            return 0
        self._check_recipe(says)
        state = self.at(0)
        fingerprint = state["run"]["data"]
        checkpoints.load(steps[-1], state)
        if state["run"]["data"] != fingerprint:
            raise TrainingError(
                f"the data, seed or batch size differs from that of {checkpoints.path(steps[-1])}, so "
                "samples would be lost or repeated: restore them (samples may be removed, but not added, changed or "
                "moved), or choose another output"
            )
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        self.schedule.load_state_dict(state["schedule"])
        self.recent.extend(state["run"]["recent"])
        if "objective" in state:
            self.objective.load_state(state["objective"])
        logger.info("resumed after step %d", state["run"]["step"])
        return int(state["run"]["step"])

    def write_recipe(self) -> None:
        """Write the run's recipe for the next start."""
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        (self.recipe.output / RECIPE_FILE).write_text(text, encoding="utf-8")

    def _check_recipe(self, says: bool) -> None:
        """Raise TrainingError if the recipe is incompatible with the run in the output; log other changes."""
        path = self.recipe.output / RECIPE_FILE
        if not path.exists():
            return
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), self.recipe.model_dump(mode="json")
        # The recipe may be older than an objective, or than a field of the optimizer.
        before = dict.fromkeys(self.recipe.objective_fields()) | before
        before["optimizer"] = type(self.recipe.optimizer).model_validate(before["optimizer"]).model_dump(mode="json")
        other = [name for name in before if name in now and before[name] != now[name]]
        if wrong := [name for name in (*_KEPT, *self.recipe.objective_fields()) if name in other]:
            name = wrong[0]
            raise TrainingError(
                f"{self.recipe.output} has a run of another recipe: {', '.join(wrong)} changed ({name} was "
                f"{before[name]!r} and is {now[name]!r}). Choose another output; to go on with that run, restore what "
                f"{path} holds"
            )
        if other and says:
            logger.info("changed since the last start of this run: %s", ", ".join(other))

    def _data_mark(self) -> str:
        """A hash of the samples and of everything that determines their order."""
        schedule = self.loader.schedule
        marked = hashlib.sha256(np.ascontiguousarray(schedule.order(0), dtype=np.int64).tobytes())
        marked.update(self.loader.contents.encode())
        return f"{marked.hexdigest()[:16]}-{schedule.batch_size}-{self.recipe.seed}"
