"""Objectives relative to a reference (the model that the run began with) and its log-probabilities of two answers.

Both answers follow their question in one sequence, as two branches. The reference's log-probabilities are computed
before the first step (`precomputed`), or in each step by the model without its adapters (`base`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_fast.errors import RecipeError
from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.models.vlm import Inputs
from llava_fast.storage.files import file_written_whole
from llava_fast.train.data.loader import LeftOut, Loader
from llava_fast.train.data.run_samples import RunSamples
from llava_fast.train.data.samples import SampleTable
from llava_fast.train.data.workers import in_workers
from llava_fast.train.left_out import left_out_together
from llava_fast.train.objective import Objective, ObjectiveSettings, forward
from llava_fast.train.parallel import World, place, placed_dtype
from llava_fast.train.parts import is_factor

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")

_SAMPLED = 4096  # values of each weight in the hash that identifies the initial model


class ReferenceSettings(ObjectiveSettings):
    """The settings of an objective with a reference."""

    section: ClassVar[str]

    reference: Literal["precomputed", "base"] = "precomputed"  # base: the model without its adapters (lora)

    def check(self, recipe: Recipe) -> None:
        kept = (recipe.data.batching, recipe.data.too_long, recipe.data.label_mask, recipe.loss_average)
        if kept != ("packed", "drop", "answers", "step"):
            raise ValueError(
                f"`{self.section}` needs data.batching: packed, data.too_long: drop, data.label_mask: answers and "
                "loss_average: step"
            )
        if self.reference == "base" and recipe.lora is None:
            raise ValueError(
                f"`{self.section}.reference: base` is the model without its adapters: give `lora`, or `precomputed`"
            )


class AgainstReference(Objective):
    """An objective over sequences that end in two answers, each with its reference log-probability."""

    branches = 2

    def __init__(self, recipe: Recipe, settings: ReferenceSettings) -> None:
        super().__init__(recipe)
        self.settings = settings

    @abstractmethod
    def micro_batches(self, table: SampleTable, processor: Processor, references: np.ndarray | None) -> Dataset:
        """A Dataset that maps sample numbers to a micro-batch of sequences with two branches. references: float32
        [samples, 2], which become the plan's column "reference" [sequences, 2]."""

    def fingerprint(self) -> bytes:
        """Everything on which the reference depends besides samples, weights and precision."""
        return b""

    def processor(self, model: Llava) -> Processor:
        processor = super().processor(model)
        # Beyond it answers have no common prefix, or the reference, an inference, differs from the policy in training.
        if (length := model.config.decoder.reference_length) is not None:
            processor = dataclasses.replace(processor, max_rows=min(processor.max_rows or length, length))
        return processor

    def prepare(self, loader: Loader, samples: RunSamples, processor: Processor, model: Llava, world: World) -> None:
        loader.micro_batches = self.micro_batches(samples.table, processor, None)
        if self.settings.reference == "base":
            return
        fingerprint = hashlib.blake2b(digest_size=16)
        weights = weights_mark(model, self.recipe)
        for part in (samples.table.fingerprint(), processor.template.name, weights, self.recipe.precision):
            fingerprint.update(part.encode())
        measured = samples.lengths  # depend on tokenizer, tiles and frames
        for column in (measured.text, measured.visual, samples.left):
            fingerprint.update(column.tobytes())
        fingerprint.update(self.fingerprint())
        path = self.recipe.output / "references" / f"{fingerprint.hexdigest()}.npy"
        references = reference_log_probs(self.recipe, model, loader, np.flatnonzero(samples.left), path, world)
        loader.micro_batches = self.micro_batches(samples.table, processor, references)

    def start(self, model: nn.Module, world: World) -> None:
        super().start(model, world)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if self.settings.reference == "base" and any(not is_factor(name) for name in trained):
            raise RecipeError(
                f"{self.settings.section}.reference: base is the model without its adapters, so only adapters may be "
                "trained: leave `trainable` empty and give `lora`, or use `reference: precomputed`"
            )
        # If all adapters are in the decoder's layers, both passes of a batch have the same inputs.
        self.inputs_are_the_bases = all("decoder.layers." in name for name in trained)

    def forward(self, model: nn.Module, batch: Batch, **options: Any) -> tuple[Tensor, Inputs]:
        return forward(model, batch, self.recipe.precision, **options)

    def reference(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Inputs | None]:
        """The reference's log-probabilities [sequences, 2] of a batch; and the decoder's inputs if the policy has the
        same, so that tower and projector run once."""
        if self.settings.reference == "precomputed":
            return batch.weight("reference"), None
        with torch.no_grad(), adapters_off(model, self.settings.section):
            losses, inputs = self.forward(model, batch)
        if not batch.plan.lengths:  # no sample, but all processes must run every module equally often
            return losses.new_zeros(0, 2), None
        reference, _ = answer_log_probs(losses, batch.plan)
        return reference, inputs if self.inputs_are_the_bases else None

    @property
    def passes_before(self) -> int:
        return int(self.settings.reference == "precomputed")

    @property
    def passes_beside(self) -> int:
        return int(self.settings.reference == "base")


def answer_log_probs(losses: Tensor, plan: TokenPlan) -> tuple[Tensor, Tensor]:
    """(log-probability, number of tokens) of both answers of each sequence, each float32 [sequences, 2], from the
    negative log-likelihoods of a plan's supervised rows. Tokens in the common prefix count for both."""
    part = 3 * plan.column("supervised_sequence") + plan.column("supervised_branch")
    counts = torch.from_numpy(np.bincount(part, minlength=3 * len(plan.lengths))).to(losses.device)
    sums = torch.segment_reduce(losses, "sum", lengths=counts, initial=0).view(-1, 3)  # rows are in order of `part`
    tokens = counts.view(-1, 3).to(losses.dtype)
    return -(sums[:, :1] + sums[:, 1:]), tokens[:, :1] + tokens[:, 1:]


@contextlib.contextmanager
def adapters_off(model: nn.Module, section: str = "dpo") -> Iterator[None]:
    """Disable the model's PEFT adapters inside the block, whether PEFT has wrapped the model or only inserted adapters.
    Raises RecipeError, naming the recipe's section, if the model has none."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise RecipeError(
            f"{section}.reference: base needs PEFT: pip install 'llava_fast[train]', or use `precomputed`"
        ) from None
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise RecipeError(f"{section}.reference: base needs a model with adapters: give `lora`, or use `precomputed`")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:  # PEFT freezes them, and FSDP2 remembers the state of the first pass
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def reference_log_probs(
    recipe: Recipe, model: Llava, loader: Loader, samples: np.ndarray, path: Path, world: World
) -> np.ndarray:
    """The initial model's log-probabilities of both answers, float32 [all samples, 2]; NaN for samples not in `samples`
    and for skipped samples that could not be read.

    Computed once and written atomically to `path`; a resumed run reads them.
    """
    if world.sum(torch.tensor([world.first and path.exists()], dtype=torch.int32, device=world.device)).item():
        return np.load(path)
    place(model.parameters(), recipe, world)  # on each device completely, even if it is sharded later
    found = torch.zeros(len(loader.lengths.text), 2, device=world.device)
    mine = loader.pack(samples.tolist())[world.rank]
    batches = in_workers(loader.micro_batches, mine, recipe.data.workers)
    left_out: list[LeftOut] = []
    was_training = model.training
    model.eval()
    with tqdm(total=sum(map(len, mine)), desc="reference", unit=" samples", disable=not world.first) as bar:
        for numbers, (prepared, _, bad) in zip(mine, batches, strict=True):
            left_out += bad
            kept = [number for number in numbers if number not in dict(bad)]
            if kept:
                losses, _ = forward(model, Batch.from_prepared(prepared, world.device), recipe.precision)
                found[kept] = answer_log_probs(losses, prepared.plan)[0]
            bar.update(len(numbers))
    model.train(was_training)
    for number, problem in left_out_together(recipe, world, left_out, "reference"):
        samples = samples[samples != number]
        if world.first:
            logger.warning("a sample has no reference: %s", problem)
    whole = world.sum(found).cpu().numpy()
    whole[np.setdiff1d(np.arange(len(whole)), samples)] = np.nan
    if world.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_written_whole(path) as new, new.open("wb") as file:
            np.save(file, whole)
    world.together()
    return whole


def weights_mark(model: nn.Module, recipe: Recipe) -> str:
    """A hash of evenly spaced values of each weight as rounded by `place`, without adapters (which have no effect at
    the start)."""
    fingerprint = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not is_factor(name):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED)].to(placed_dtype(parameter, recipe)).float().cpu().numpy()
            fingerprint.update(f"{name} {tuple(parameter.shape)}".encode() + sample.tobytes())
    return fingerprint.hexdigest()
