"""The training loop for any objective, with restarts from checkpoints.

An optimiser step: fetch the step's micro-batches, run each forward and backward, clip, update, report. The loss is the
mean of the objective's losses over the whole step (all processes and micro-batches), so it does not depend on how the
step is split.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llava_fast.errors import TrainingError
from llava_fast.generation.llava import Llava
from llava_fast.models.batch import Batch
from llava_fast.models.recompute import set_recompute
from llava_fast.ops.selection.sharing import share
from llava_fast.train.checkpoint import RunCheckpoints
from llava_fast.train.data.loader import Loader, StepBatch
from llava_fast.train.estimate.flops import Utilisation
from llava_fast.train.export import export
from llava_fast.train.left_out import left_out_together
from llava_fast.train.metrics import Metrics
from llava_fast.train.objective import Objective
from llava_fast.train.optim import build_optimizer, build_schedule
from llava_fast.train.parallel import World, clip_gradients, parallelize
from llava_fast.train.recipe import Recipe
from llava_fast.train.resume import RunState

_RECENT = 50  # steps whose median loss defines a spike
MOST_EMPTY_STEPS = 10
"""Consecutive steps without a readable sample after which a run stops, since the data must be missing."""


class Trainer:
    """Runs a recipe's steps. model: a LlavaModel, frozen according to the recipe; objective: the one for which the
    loader was made (default: the recipe's)."""

    def __init__(
        self, recipe: Recipe, model: Llava, loader: Loader, world: World, objective: Objective | None = None
    ) -> None:
        self.recipe, self.loader, self.world = recipe, loader, world
        self.objective = objective or recipe.objective()
        self.bare = model
        set_recompute(model, recipe.recompute)
        self.model = parallelize(model, recipe, world)
        self.objective.start(self.model, world)
        self.total = loader.schedule.total
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.schedule = build_schedule(self.optimizer, recipe.optimizer, self.total)
        gpus = world.mesh.size() if world.mesh is not None else 1
        self.utilisation = Utilisation(model, world.device, recipe.precision, recipe.tf32, gpus)
        self.checkpoints = RunCheckpoints(recipe.output / "checkpoints", recipe.checkpoints.keep)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self.run_state = RunState(
            recipe, self.model, self.optimizer, self.schedule, loader, self.objective, self.recent
        )

    def run(self, resume: bool = True) -> None:
        """Run from the newest checkpoint, or from the beginning, to the end. Raises TrainingError."""
        first = self.resume() if resume else 0
        if not resume and self.checkpoints.steps():
            raise TrainingError(f"{self.checkpoints.directory} has a run: choose another output, or resume it")
        if self.world.first:
            self.run_state.write_recipe()
        metrics = Metrics(self.recipe, self.total, first, self.world.first)
        with contextlib.closing(metrics):
            empty = 0
            for batch in self.loader.steps(first):
                try:
                    reported = self.step(batch)
                    metrics.report(reported)
                    empty = empty + 1 if reported["loss"] is None else 0
                    if empty == MOST_EMPTY_STEPS:
                        raise TrainingError(
                            f"no sample of the last {empty} steps could be read: see left_out_samples in the metrics, "
                            "and check that the data still exists; the run can be resumed from its newest checkpoint"
                        )
                except TrainingError:  # raised on all processes
                    self.checkpoints.finish()
                    raise
                if batch.step == first:
                    share(self.world.device, is_last=True)  # the verdicts of the first step
                self.checkpoints.poll()
                done = batch.step + 1
                if done % self.recipe.checkpoints.every == 0 or done == self.total:
                    metrics.flush()
                    self.checkpoints.finish()  # keep only one copy on the host
                    self.checkpoints.save(done, self.state(done))
            self.checkpoints.finish()
            metrics.say_left_out()

    def step(self, step_batch: StepBatch) -> dict[str, Any]:
        """Run one optimiser step and return its metrics. Samples that could not be read are left out on all processes;
        if none is left, no weight changes. Raises TrainingError, before any change, if the loss or the gradient is not
        finite, if the loss spikes, and for an unreadable sample if the recipe does not skip it."""
        started = time.perf_counter()
        torch.manual_seed(hash((self.recipe.seed, step_batch.step, self.world.rank)))  # so a resumed step is the same
        when = f"step {step_batch.step + 1}"
        left_out = left_out_together(self.recipe, self.world, step_batch.left_out, when)
        self.objective.begin(step_batch.step)
        count, emptied = self._sums(
            sum(self.objective.count(made.plan) for made in step_batch.micro_batches), step_batch.emptied
        )
        value, norm = (None, None) if not count else self._gradients(step_batch, count, emptied)
        rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()  # does not change weights without a gradient
        self.schedule.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started + step_batch.wait
        plans = [made.plan for made in step_batch.micro_batches]
        own = (len(step_batch.names), sum(sum(plan.lengths) for plan in plans), sum(map(self.utilisation.flops, plans)))
        samples, rows, flops = self.world.sum(torch.tensor(own, dtype=torch.float64, device=self.world.device)).tolist()
        problems = [problem for _, problem in left_out]
        return {
            "step": step_batch.step + 1,
            "loss": value,
            "lr": rate,
            "gradient_norm": norm,
            self.objective.unit: count,
            "samples_per_second": samples / seconds,
            "tokens_per_second": rows / seconds,
            "mfu": self.utilisation.share(flops, seconds),
            "data_wait": step_batch.wait,
            "peak_memory": self._peak_memory(),
            "left_out": len(problems),
            **self.objective.report(),
            **({"left_out_samples": problems} if problems else {}),
        }

    def _gradients(self, step_batch: StepBatch, count: int, emptied: int) -> tuple[float, float]:
        """Compute and clip a step's gradients; return (loss, gradient norm before clipping)."""
        last = len(step_batch.micro_batches)
        micro = last - emptied / self.world.size
        # Run an empty micro-batch only if another process waits for it.
        mine = [
            (number, made)
            for number, made in enumerate(step_batch.micro_batches, start=1)
            if made.plan.lengths or self.bare.runs_every_part
        ]
        device = self.world.device
        self.objective.survey(self.model, (Batch.from_prepared(made, device) for _, made in mine), count)
        loss = torch.zeros(1, device=device)
        for number, made in mine:
            if isinstance(self.model, DistributedDataParallel):  # reduce gradients only once per step
                self.model.require_backward_grad_sync = number == last
            share = self._loss(Batch.from_prepared(made, device), count, micro)
            share.backward()
            loss += share.detach() / self.world.size
        value = float(self.world.sum(loss))
        norm = clip_gradients(self.trained, self.recipe.optimizer.clip)
        self._check(value, norm, step_batch)
        return value, norm

    def _sums(self, *values: int) -> list[int]:
        """Each of these values, summed over all processes."""
        return [int(value) for value in self.world.sum(torch.tensor(values, device=self.world.device))]

    def _loss(self, batch: Batch, count: int, micro_batches: float) -> Tensor:
        """This micro-batch's part of the step's loss, times the number of processes, over which gradients are
        averaged."""
        losses = self.objective.losses(self.model, batch)
        if self.recipe.loss_average == "micro_batch":
            return losses.sum() / max(len(losses), 1) / micro_batches
        return losses.sum() * (self.world.size / max(count, 1))

    def _check(self, loss: float, norm: float, step_batch: StepBatch) -> None:
        usual = statistics.median(self.recent) if len(self.recent) == _RECENT else None
        most = self.recipe.spike if self.objective.stops_at_spikes else None
        spiked = usual is not None and most is not None and loss > most * usual
        if spiked or not np.isfinite(loss) or not np.isfinite(norm):
            what = (
                f"{loss / usual:.1f} times the median {usual:.4f}" if spiked and usual else f"gradient norm {norm:.4g}"
            )
            raise TrainingError(
                f"step {step_batch.step + 1}: the loss is {loss:.4g} ({what}). No weight was updated. The "
                f"step's samples on process {self.world.rank}: {', '.join(step_batch.names)}"
            )
        self.recent.append(loss)

    def _peak_memory(self) -> int:
        """Peak memory in bytes: of the GPU, or of this process on a CPU."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state(self, step: int) -> dict[str, Any]:
        """The state of the run for a checkpoint."""
        return self.run_state.at(step)

    def resume(self) -> int:
        """Load the newest checkpoint; return its number of steps, 0 without one."""
        return self.run_state.resume(self.checkpoints, self.world.first)

    def export(self) -> Path:
        """Write the trained model as a checkpoint: see `export.export`."""
        return export(self.recipe, self.model, self.bare, self.world)
