"""What a run minimises. An objective defines its data, what a step's loss is a mean over, and the losses of a
micro-batch; the trainer depends on nothing else.

A new objective is one file in objectives/, with its settings and its class, and one field of `recipe.Recipe`.
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

from llava_fast.errors import RecipeError
from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.models.vlm import LlavaOutput
from llava_fast.train.data.lengths import Lengths
from llava_fast.train.data.loader import Loader
from llava_fast.train.data.run_samples import RunSamples
from llava_fast.train.data.samples import SampleTable, Source, read_sources
from llava_fast.train.parallel import World

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.train.recipe import Recipe


class ObjectiveSettings(BaseModel):
    """The section of a recipe that names an objective and sets it."""

    model_config = ConfigDict(extra="forbid")

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError if the rest of the recipe is incompatible with this section."""

    def objective(self, recipe: Recipe) -> Objective:
        raise NotImplementedError


class Objective(ABC):
    """The methods are called in this order:

    once        processor, read, lengths, prepare: the data, before any model is spread over processes;
                start: the model as it will be run; load_state: only in a run that is resumed.
    each step   begin; count for each micro-batch; survey, which sees all of them before there is a gradient; losses for
                each micro-batch; report. A step without a single thing to count has no survey and no losses.

    unit            what `count` counts: the name of that number in the metrics.
    stops_at_spikes whether a loss many times the usual indicates a broken run.
    branches        continuations of a sample in its sequence, for cost estimates; 1 is its own answer alone.
    figures         what `losses` and `survey` add to `means`, by name: reported as means over all processes.
    """

    unit: ClassVar[str]
    stops_at_spikes: ClassVar[bool] = True
    branches: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    # ---------------------------------------------------------------- data

    def read(self, sources: Sequence[Source]) -> SampleTable:
        """The data files of a run. Default: LLaVA-format samples. Raises DataError."""
        return read_sources(sources)

    def processor(self, model: Llava) -> Processor:
        """The processor that samples are measured and prepared with. Raises RecipeError for a model without one."""
        return processor_of(model)

    def lengths(self, table: SampleTable, measured: Lengths) -> tuple[Lengths, Lengths | None]:
        """From the measured lengths of all that the table holds: those that must fit the model's context, one entry for
        each sample of a step; and the rows that a sample takes in a micro-batch, if those are others."""
        return measured, None

    def prepare(self, loader: Loader, samples: RunSamples, processor: Processor, model: Llava, world: World) -> None:
        """Before the first step, with the whole model as the run begins: give the loader another data set
        (`micro_batches`) or other rows (`lengths`), and calculate what every step needs."""

    # ---------------------------------------------------------------- a step

    def start(self, model: nn.Module, world: World) -> None:
        """Called with the model that all steps run. Raises RecipeError if this objective cannot train it."""
        self.world = world
        self.means = Means(self.figures, world)

    def begin(self, step: int) -> None:
        """Step number `step`, counted from 0, begins, also where a resumed run goes on with it."""
        self.means.clear()

    @abstractmethod
    def count(self, plan: TokenPlan) -> int:
        """How many losses a micro-batch has. Their sum over processes and micro-batches is a step's denominator."""

    def survey(self, model: nn.Module, batches: Iterable[Batch], count: int) -> None:
        """Calculate without gradients what the losses depend on beyond their own micro-batch. `batches` are this
        process's of the step, made as they are iterated over, and `count` is the step's denominator."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32 [count(batch.plan)]: the losses of a micro-batch. Batches come in the order in which `survey` saw
        them.

        A process may have no sample where others have some (`batch.plan.lengths` is empty). Under DDP and FSDP2 they
        wait for it: it must run the same modules, as often, and return a tensor of no entries that depends on them."""

    def report(self) -> dict[str, float | None]:
        """Metrics of the step, equal on every process. Default: the means of `figures`."""
        return self.means.take() if self.figures else {}

    # ---------------------------------------------------------------- a checkpoint, a cost estimate

    def state(self) -> dict[str, Any]:
        """The objective's state for a resumed run, as plain values and tensors (copies: a resume fills them in place);
        empty if steps depend only on the data, the weights and the step's number.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    @property
    def passes_before(self) -> int:
        """Forward passes over all data before the first step."""
        return 0

    @property
    def passes_beside(self) -> int:
        """Forward passes of a step without gradients, in addition to the one with."""
        return 0


class Means:
    """Means of a step's figures over all processes: `add` the values of each micro-batch, then `take`."""

    def __init__(self, names: Sequence[str], world: World) -> None:
        self.names, self.world = list(names), world
        self.clear()

    def clear(self) -> None:
        self._sums = torch.zeros(2, len(self.names), device=self.world.device)

    def add(self, **values: Tensor) -> None:
        """values[name]: any number of them, also none."""
        for name, value in values.items():
            self._sums[0, self.names.index(name)] += value.detach().sum()
            self._sums[1, self.names.index(name)] += value.numel()

    def take(self) -> dict[str, float | None]:
        """The mean of each, None without a value. Every process calls it."""
        sums, counts = self.world.sum(self._sums)
        means = (sums / counts).tolist()
        return {
            name: mean if count else None for name, mean, count in zip(self.names, means, counts.tolist(), strict=True)
        }


def processor_of(model: Llava) -> Processor:
    """The model's processor. Raises RecipeError for a model made without one."""
    if model.processor is None:
        raise RecipeError("the model has no processor: load it with llava_fast.load")
    return model.processor


def forward(model: nn.Module, batch: Batch, precision: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A model's losses on a batch [supervised rows], float32, computed in the precision asked for; and the decoder's
    inputs [rows, width]."""
    dtype = getattr(torch, precision)
    cast = dtype != torch.float32 and not isinstance(model, FSDPModule)  # which casts by itself
    with torch.autocast(batch.flat.device.type, dtype, enabled=cast):
        out: LlavaOutput = model(batch, logits="none", **options)
    assert out.losses is not None
    assert out.inputs_embeds is not None
    return out.losses, out.inputs_embeds
