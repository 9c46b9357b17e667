"""The interface of training objectives. An objective defines its data, what a step's loss is averaged over, and the
losses of a micro-batch; the trainer depends on nothing else.

A new objective is one file in objectives/ with its settings and its class, and one field of `recipe.Recipe`.
"""

# ruff: noqa: B027 (hooks that most objectives leave empty)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llava_fast.api import load, load_processor
from llava_fast.checkpoints.assemble import Assembly, open_checkpoint
from llava_fast.errors import RecipeError
from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.models.vlm import Inputs, LlavaOutput
from llava_fast.train.data.lengths import Lengths
from llava_fast.train.data.loader import Loader
from llava_fast.train.data.run_samples import RunSamples
from llava_fast.train.data.samples import SampleTable, Source, read_sources
from llava_fast.train.parallel import World

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.train.recipe import Recipe


class ObjectiveSettings(BaseModel):
    """The section of a recipe that selects and configures an objective."""

    model_config = ConfigDict(extra="forbid")

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError if the rest of the recipe is incompatible with this section."""

    def objective(self, recipe: Recipe) -> Objective:
        raise NotImplementedError


class Objective(ABC):
    """Methods are called in this order:

    once        load: the model; processor, read, lengths, prepare: the data, before the model is parallelised;
                start: the model as it will run; load_state: only in a resumed run.
    each step   begin; count for each micro-batch; survey, which sees all micro-batches before any gradient is computed;
                losses for each micro-batch; report. survey and losses are skipped if all counts are 0.

    unit            what `count` counts: the name of that number in the metrics.
    stops_at_spikes whether a loss far above the usual indicates a broken run.
    branches        number of continuations of a sample in its sequence, for cost estimates; 1: only its own answer.
    usual_text      rows of text of a usual sample, for cost estimates; None: by the chat template.
    figures         names of the values that `losses` and `survey` add to `means`, reported as means over all processes.
    """

    unit: ClassVar[str]
    stops_at_spikes: ClassVar[bool] = True
    branches: ClassVar[int] = 1
    usual_text: ClassVar[int | None] = None
    figures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    # ---------------------------------------------------------------- model and data

    def load(self) -> Llava:
        """The recipe's model on the host, as stored, before any part is frozen. Raises CheckpointError."""
        recipe = self.recipe
        template = recipe.data.template
        return load(recipe.model, "cpu", "auto", chat_template=template, merge=False, quantize=recipe.quantize)

    def read(self, sources: Sequence[Source]) -> SampleTable:
        """Read the data files of a run. Default: LLaVA-format samples. Raises DataError."""
        return read_sources(sources)

    def read_processor(self, model: str | Assembly, template: str | None) -> Processor:
        """The processor of a model of this objective, without reading its weights: for `llava-fast data check`. Raises
        CheckpointError."""
        return load_processor(*open_checkpoint(model), template)

    def processor(self, model: Llava) -> Processor:
        """The processor with which samples are measured and prepared. Raises RecipeError for a model without one."""
        return processor_of(model)

    def lengths(self, table: SampleTable, measured: Lengths) -> tuple[Lengths, Lengths | None]:
        """From the measured lengths of all table entries: (the lengths that must fit the model's context, one entry per
        sample of a step; the rows of a sample in a micro-batch, or None if they are the same)."""
        return measured, None

    def prepare(self, loader: Loader, samples: RunSamples, processor: Processor, model: Llava, world: World) -> None:
        """Called before the first step, with the complete initial model. May replace the loader's dataset
        (`micro_batches`) or rows (`lengths`), and may compute values that every step needs."""

    # ---------------------------------------------------------------- a step

    def start(self, model: nn.Module, world: World) -> None:
        """Called with the model that runs in all steps. Raises RecipeError if this objective cannot train it."""
        self.world = world
        self.means = Means(self.figures, world)

    def begin(self, step: int) -> None:
        """Called at the beginning of each step, counted from 0, also for the first step of a resumed run."""
        self.means.clear()

    @abstractmethod
    def count(self, plan: TokenPlan) -> int:
        """The number of losses of a micro-batch. Its sum over processes and micro-batches is a step's denominator."""

    def survey(self, model: nn.Module, batches: Iterable[Batch], count: int) -> None:
        """Compute, without gradients, values that the losses need from other micro-batches. batches: this process's
        micro-batches of the step, created during iteration; count: the step's denominator."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 [count(batch.plan)]: the losses of a micro-batch. Batches come in the same order as in `survey`.

        A micro-batch may be empty while those of other processes are not (`batch.plan.lengths` is empty). Since other
        processes wait for it under DDP and FSDP2, this process must run the same modules equally often, and return an
        empty tensor that depends on them."""

    def report(self) -> dict[str, float | None]:
        """Metrics of the step, equal on every process. Default: the means of `figures`."""
        return self.means.take() if self.figures else {}

    # ---------------------------------------------------------------- a checkpoint, a cost estimate

    def state(self) -> dict[str, Any]:
        """The objective's state for a resumed run, as plain values and tensors (copies, since resuming fills them in
        place); empty if steps depend only on the data, the weights and the step number.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    @property
    def passes_before(self) -> int:
        """Number of forward passes over all data before the first step."""
        return 0

    @property
    def passes_beside(self) -> int:
        """Number of forward passes without gradients per step, in addition to the one with gradients."""
        return 0


class Means:
    """Means of a step's figures over all processes: `add` the values of each micro-batch, then `take`."""

    def __init__(self, names: Sequence[str], world: World) -> None:
        self.names, self.world = list(names), world
        self.clear()

    def clear(self) -> None:
        self._sums = torch.zeros(2, len(self.names), device=self.world.device)

    def add(self, **values: Tensor) -> None:
        """values[name]: a tensor with any number of values, possibly none."""
        for name, value in values.items():
            self._sums[0, self.names.index(name)] += value.detach().sum()
            self._sums[1, self.names.index(name)] += value.numel()

    def take(self) -> dict[str, float | None]:
        """The mean of each figure; None without values. A collective."""
        sums, counts = self.world.sum(self._sums)
        means = (sums / counts).tolist()
        return {
            name: mean if count else None for name, mean, count in zip(self.names, means, counts.tolist(), strict=True)
        }


def processor_of(model: Llava) -> Processor:
    """The model's processor. Raises RecipeError for a model without one."""
    if model.processor is None:
        raise RecipeError("the model has no processor: load it with llava_fast.load")
    return model.processor


def forward(model: nn.Module, batch: Batch, precision: str, **options: Any) -> tuple[Tensor, Inputs]:
    """(a model's losses on a batch, float32 [supervised rows], computed in `precision`; the decoder's inputs)."""
    dtype = getattr(torch, precision)
    cast = dtype != torch.float32 and not isinstance(model, FSDPModule)  # FSDP2 casts by itself
    with torch.autocast(batch.flat.device.type, dtype, enabled=cast):
        out: LlavaOutput = model(batch, logits="none", **options)
    assert out.losses is not None
    assert out.inputs is not None
    return out.losses, out.inputs
