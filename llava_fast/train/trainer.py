"""The training loop: from a recipe to a trained model, through kills and restarts.

One optimiser step is: fetch the step's micro-batches, run each forward and backward, clip, update, report. The loss is
the negative log-likelihood summed over the supervised tokens of the whole step (all processes and micro-batches),
divided by their number, so that neither micro-batches nor processes change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import resource
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from llava_fast.api import load
from llava_fast.checkpoints.adapters import save_projector
from llava_fast.checkpoints.save import NOTE_FILE, save
from llava_fast.errors import RecipeError, TrainingError
from llava_fast.generation.llava import Llava
from llava_fast.inputs.prepared import Prepared
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.models.recompute import set_recompute
from llava_fast.models.vlm import LlavaOutput
from llava_fast.train.checkpoint import Checkpoints
from llava_fast.train.data.lengths import Lengths, measure
from llava_fast.train.data.loader import Loader, StepBatch
from llava_fast.train.data.run_samples import run_samples
from llava_fast.train.data.samples import SampleTable, read_sources
from llava_fast.train.data.usable import usable_samples
from llava_fast.train.estimate.flops import Utilisation
from llava_fast.train.left_out import left_out_together
from llava_fast.train.lora import add_adapters, export_adapter, merged
from llava_fast.train.metrics import Metrics
from llava_fast.train.optim import build_optimizer, build_schedule, freeze, part_of
from llava_fast.train.parallel import World, clip_gradients, is_sharded, join_world, parallelize, place
from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")
RECIPE_FILE = "recipe.yaml"  # in a run's output: the recipe that it was begun with, or last resumed with
_RECENT = 50  # steps that a spike is judged by
_KEPT = ("model", "trainable", "lora", "dpo", "optimizer")  # fields that a resumed run takes from its checkpoint


def train(recipe: Recipe, resume: bool = True, build: Callable[[Recipe, Llava, World], Trainer] | None = None) -> Path:
    """Run a recipe to its end and export the model; returns the model's directory (`output`/model).

    resume  go on from the newest checkpoint in the recipe's output, if there is one. False refuses to run over it.
    build   makes the trainer; default: one over the recipe's samples (preference tuning has its own).
    Raises RecipeError, DataError or CheckpointError before the first step, TrainingError when a run must stop.
    """
    world = join_world(recipe.parallel)
    if world.first:
        check_output(recipe.output)
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    model = load_model(recipe, world)
    trainer = (build or build_trainer)(recipe, model, world)
    trainer.run(resume)
    return trainer.export()


def check_output(path: Path) -> None:
    """Make the output directory, and see that it can be written to. Raises RecipeError now, not when the first
    checkpoint is due."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RecipeError(f"output: nothing can be written to {path} ({error.strerror}): choose another") from None


def load_model(recipe: Recipe, world: World) -> Llava:
    """The recipe's model on this process's device: what is trained in float32, the rest in the precision asked for. One
    that is to be sharded stays on the host as its checkpoint holds it, so that no device ever holds all of it."""
    model = load(recipe.model, device="cpu", dtype="auto", chat_template=recipe.data.template)
    freeze(model, recipe)
    if recipe.lora is not None:
        add_adapters(model, recipe)
    if not is_sharded(recipe, world):
        place(model.parameters(), recipe, world)
    processor = processor_of(model)
    data = recipe.data
    most = data.max_length or processor.max_rows
    model.processor = dataclasses.replace(
        processor, video_frames=data.video_frames, time_instruction=data.time_instruction, max_rows=most
    )
    return model.train()


def processor_of(model: Llava) -> Processor:
    """The model's processor. Raises RecipeError for a model made without one."""
    if model.processor is None:
        raise RecipeError("the model has no processor: load it with llava_fast.load")
    return model.processor


def build_trainer(recipe: Recipe, model: Llava, world: World) -> Trainer:
    """A trainer over the recipe's samples. Raises RecipeError for a recipe of preference tuning."""
    if recipe.dpo is not None:
        raise RecipeError("the recipe has a section `dpo`: run `llava-fast dpo`, or leave the section out")
    return Trainer(recipe, model, build_loader(recipe, model, world), world)


def build_loader(recipe: Recipe, model: Llava, world: World) -> Loader:
    """The recipe's data, measured once and scheduled. Raises DataError, with what is wrong, before any training."""
    processor = processor_of(model)
    table = read_sources(recipe.data.sources)
    lengths = measure_together(recipe, table, processor, world)
    usable, lengths = usable_samples(recipe, table, lengths, processor, quiet=not world.first)
    single = dataclasses.replace(processor, threads=1)  # workers are the parallelism
    samples = run_samples(recipe, table, lengths, usable, world.first)
    return Loader(recipe, samples, single, model.config.decoder, world.size, world.rank)


def measure_together(recipe: Recipe, table: SampleTable, processor: Processor, world: World) -> Lengths:
    """The lengths of all samples."""
    if not world.first:
        world.together()  # the first process measures, the others read what it found
    lengths = measure(
        table,
        processor,
        recipe.data.label_mask,
        recipe.data.workers,
        recipe.output / "lengths",
        again=world.first,
        progress=world.first,
    )
    if world.first:
        world.together()
    return lengths


class Trainer:
    """Runs a recipe's steps. `model` is a LlavaModel with its parameters frozen or not as the recipe says."""

    def __init__(self, recipe: Recipe, model: Llava, loader: Loader, world: World) -> None:
        self.recipe, self.loader, self.world = recipe, loader, world
        self.bare = model
        set_recompute(model, recipe.recompute)
        self.model = parallelize(model, recipe, world)
        self.total = loader.schedule.total
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.schedule = build_schedule(self.optimizer, recipe.optimizer, self.total)
        gpus = world.mesh.size() if world.mesh is not None else 1
        self.utilisation = Utilisation(model, world.device, recipe.precision, recipe.tf32, gpus)
        self.checkpoints = Checkpoints(recipe.output / "checkpoints", recipe.checkpoints.keep)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def run(self, resume: bool = True) -> None:
        """From the newest checkpoint, or the beginning, to the end."""
        first = self.resume() if resume else 0
        if not resume and self.checkpoints.steps():
            raise TrainingError(f"{self.checkpoints.directory} holds a run: choose another output, or resume it")
        if self.world.first:
            text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
            (self.recipe.output / RECIPE_FILE).write_text(text, encoding="utf-8")
        metrics = Metrics(self.recipe, self.total, first, self.world.first)
        with contextlib.closing(metrics):
            for batch in self.loader.steps(first):
                try:
                    metrics.report(self.step(batch))
                except TrainingError:  # on every process alike
                    self.checkpoints.finish()
                    raise
                self.checkpoints.poll()
                done = batch.step + 1
                if done % self.recipe.checkpoints.every == 0 or done == self.total:
                    metrics.flush()
                    self.checkpoints.finish()  # one copy on the host at a time
                    self.checkpoints.save(done, self.state(done))
            self.checkpoints.finish()
            metrics.say_left_out()

    def step(self, step_batch: StepBatch) -> dict[str, Any]:
        """One optimiser step; returns what it reports. Samples that could not be read are left out of it on every
        process; with none left it changes no weight. Raises TrainingError, before anything is changed, if the loss or
        the gradient is not finite, or the loss has jumped, or such a sample is to stop the run."""
        started = time.perf_counter()
        torch.manual_seed(hash((self.recipe.seed, step_batch.step, self.world.rank)))  # so a resumed step is the same
        when = f"step {step_batch.step + 1}"
        left_out = left_out_together(self.recipe, self.world, step_batch.left_out, when)
        tokens, emptied = self._sums(sum(map(self._count, step_batch.micro_batches)), step_batch.emptied)
        value, norm = (None, None) if not tokens else self._gradients(step_batch, tokens, emptied)
        rate = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()  # leaves a weight without a gradient as it is
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
            "supervised_tokens": tokens,
            "samples_per_second": samples / seconds,
            "tokens_per_second": rows / seconds,
            "mfu": self.utilisation.share(flops, seconds),
            "data_wait": step_batch.wait,
            "peak_memory": self._peak_memory(),
            "left_out": len(problems),
            **({"left_out_samples": problems} if problems else {}),
        }

    def _gradients(self, step_batch: StepBatch, tokens: int, emptied: int) -> tuple[float, float]:
        """Makes a step's gradients, clipped; (loss, gradient norm before)."""
        last = len(step_batch.micro_batches)
        micro = last - emptied / self.world.size
        loss = torch.zeros(1, device=self.world.device)
        for number, prepared in enumerate(step_batch.micro_batches, start=1):
            if not prepared.plan.lengths and not self.bare.runs_every_part:
                continue  # all of its samples were left out, and no other process waits for it
            if isinstance(self.model, DistributedDataParallel):  # sums gradients of processes once a step
                self.model.require_backward_grad_sync = number == last
            share = self._loss(Batch.from_prepared(prepared, self.world.device), tokens, micro)
            share.backward()
            loss += share.detach() / self.world.size
        value = float(self.world.sum(loss))
        norm = clip_gradients(self.trained, self.recipe.optimizer.clip)
        self._check(value, norm, step_batch)
        return value, norm

    def _sums(self, *values: int) -> list[int]:
        """Each of these added over all processes."""
        return [int(value) for value in self.world.sum(torch.tensor(values, device=self.world.device))]

    def _loss(self, batch: Batch, tokens: int, micro_batches: float) -> Tensor:
        """This micro-batch's part of the step's loss, times the number of processes (gradients are averaged over
        them)."""
        losses, _ = self._forward(batch)
        if self.recipe.loss_average == "micro_batch":
            return losses.sum() / max(len(losses), 1) / micro_batches
        return losses.sum() * (self.world.size / max(tokens, 1))

    def _forward(self, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        return forward(self.model, batch, self.recipe.precision, **options)

    def _count(self, prepared: Prepared) -> int:
        """What of a micro-batch the loss is a mean over: supervised tokens."""
        return len(prepared.plan.column("supervised_row"))

    def _check(self, loss: float, norm: float, step_batch: StepBatch) -> None:
        usual = statistics.median(self.recent) if len(self.recent) == _RECENT else None
        spiked = usual is not None and self.recipe.spike is not None and loss > self.recipe.spike * usual
        if spiked or not np.isfinite(loss) or not np.isfinite(norm):
            what = (
                f"{loss / usual:.1f} times the usual {usual:.4f}" if spiked and usual else f"gradient norm {norm:.4g}"
            )
            raise TrainingError(
                f"step {step_batch.step + 1}: the loss is {loss:.4g} ({what}). Nothing was updated. The step's samples "
                f"on process {self.world.rank}: {', '.join(step_batch.names)}"
            )
        self.recent.append(loss)

    def _peak_memory(self) -> int:
        """Bytes: of the GPU, or of this process on a CPU."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def state(self, step: int) -> dict[str, Any]:
        """All that a run goes on from. Frozen weights are not in it: they are the recipe's model's."""
        model, optimizer = get_state_dict(
            self.model, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
        )
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "run": {"step": step, "data": self._data_mark(), "recent": list(self.recent)},
        }

    def resume(self) -> int:
        """Load the newest checkpoint; the number of steps done, 0 without one."""
        steps = self.checkpoints.steps()
        if not steps:
            return 0
        self._check_recipe()
        state = self.state(0)
        mark = state["run"]["data"]
        self.checkpoints.load(steps[-1], state)
        if state["run"]["data"] != mark:
            raise TrainingError(
                f"the data, seed or batch size is not what {self.checkpoints.path(steps[-1])} was made with, so "
                "samples would be lost or repeated: restore them (samples may be taken out, but not added, changed or "
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
        logger.info("resumed after step %d", state["run"]["step"])
        return int(state["run"]["step"])

    def _check_recipe(self) -> None:
        """Raises TrainingError if the output is another recipe's; other differences are said."""
        path = self.recipe.output / RECIPE_FILE
        if not path.exists():
            return
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), self.recipe.model_dump(mode="json")
        other = [name for name in before if name in now and before[name] != now[name]]
        if wrong := [name for name in _KEPT if name in other]:
            name = wrong[0]
            raise TrainingError(
                f"{self.recipe.output} holds a run of another recipe: {', '.join(wrong)} changed ({name} was "
                f"{before[name]!r} and is {now[name]!r}). Choose another output; to go on with that run, restore what "
                f"{path} holds"
            )
        if other and self.world.first:
            logger.info("what changed since this run was begun: %s", ", ".join(other))

    def _data_mark(self) -> str:
        """Changes when the samples or their order do."""
        schedule = self.loader.schedule
        marked = hashlib.sha256(np.ascontiguousarray(schedule.order(0), dtype=np.int64).tobytes())
        marked.update(self.loader.contents.encode())
        return f"{marked.hexdigest()[:16]}-{schedule.batch_size}-{self.recipe.seed}"

    def export(self) -> Path:
        """The trained model as a checkpoint that `llava_fast.load` and others read, in the recipe's precision; with
        `lora`, merged, and the adapter alone beside it (`output`/adapter). A projector that was trained alone is beside
        it too (`output`/projector), in float32."""
        path = self.recipe.output / "model"
        dtype = getattr(torch, self.recipe.precision)
        everything = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        whole = cast(dict[str, Tensor], everything)
        if self.world.first:
            for kind in ("saving", "replaced"):  # left over by an export that was killed
                for leftover in self.recipe.output.glob(f".*.{kind}-*"):
                    shutil.rmtree(leftover)
            if self.recipe.data.template:  # else the base model's own goes with it
                note = json.dumps({"chat_template": processor_of(self.bare).template.name})
                self.bare.side_files = {**getattr(self.bare, "side_files", {}), NOTE_FILE: note}
            trained = [name for name, parameter in self.bare.named_parameters() if parameter.requires_grad]
            if self.recipe.lora is not None:
                export_adapter(self.recipe.output / "adapter", whole, trained, self.bare, self.recipe)
                whole = merged(whole, self.recipe.lora)
            elif {part_of(name) for name in trained} == {"projector"}:
                alone = {name: tensor for name, tensor in whole.items() if part_of(name) == "projector"}
                note_file = self.bare.side_files.get(NOTE_FILE)
                save_projector(self.recipe.output / "projector", alone, self.bare.config, note_file)
            tensors = {name: tensor.to(dtype) for name, tensor in whole.items()}
            save(self.bare, path, layout=self.recipe.layout, overwrite=True, tensors=tensors)
        self.world.together()
        return path


def forward(model: nn.Module, batch: Batch, precision: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A model's losses on a batch [supervised rows], float32, computed in the precision asked for; and the decoder's
    inputs [rows, width]."""
    dtype = getattr(torch, precision)
    cast = dtype != torch.float32 and not isinstance(model, FSDPModule)  # which casts by itself
    with torch.autocast(batch.flat.device.type, dtype, enabled=cast):
        out: LlavaOutput = model(batch, logits="none", **options)
    assert out.losses is not None and out.inputs_embeds is not None  # the batch has labels
    return out.losses, out.inputs_embeds
