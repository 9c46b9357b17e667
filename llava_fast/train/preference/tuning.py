"""Preference tuning: `llava-fast dpo recipe.yaml`.

Direct preference optimisation (Rafailov et al. 2023): the model learns to find the chosen answer likelier than the
rejected one, measured against a reference, the model that it started from. A pair is one sequence in which both answers
follow the rows that they share (see pairs), so image and question are run once, forward and backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_fast.errors import RecipeError
from llava_fast.generation.llava import Llava
from llava_fast.inputs.prepared import Prepared
from llava_fast.models.batch import Batch
from llava_fast.train import trainer as training
from llava_fast.train.data.loader import LeftOut, Loader, StepBatch
from llava_fast.train.data.run_samples import run_samples
from llava_fast.train.data.usable import usable_samples
from llava_fast.train.data.workers import in_workers
from llava_fast.train.left_out import left_out_together
from llava_fast.train.parallel import World, place, placed_dtype
from llava_fast.train.preference.loss import answer_log_probs, preference_losses
from llava_fast.train.preference.pairs import Answers, PairBatches, read_pairs
from llava_fast.train.recipe import Dpo, Recipe

logger = logging.getLogger("llava_fast.train")

_SAMPLED = 4096  # values of each weight that tell one starting model from another
REPORTED = ("dpo_loss", "sft_loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
"""What a step reports beside an ordinary one's figures, each a mean over its pairs: see docs/training.md."""


def dpo(recipe: Recipe, resume: bool = True) -> Path:
    """Run a preference recipe to its end and export the model, as `trainer.train` does, with its errors."""
    if recipe.dpo is None:
        raise RecipeError("the recipe has no section `dpo`: add one (`dpo: {beta: 0.1}`), or run `llava-fast train`")
    # A pair's loss falls from 0.69 towards 0, so that one odd pair is many times the usual: no sign of a broken run.
    return training.train(recipe.model_copy(update={"spike": None}), resume, build_trainer)


def build_trainer(recipe: Recipe, model: Llava, world: World) -> DpoTrainer:
    """A trainer over the recipe's pairs; the reference's log-probabilities are made first, if they are to be."""
    processor = training.processor_of(model)
    if recipe.dpo is None:
        raise RecipeError("preference tuning needs a recipe with a section `dpo`")
    rope = model.config.decoder.rope
    if rope.kind == "dynamic":  # it turns a prompt by the length of what follows, so longer answers cannot share one
        most = min(processor.max_rows or model.config.decoder.max_positions, model.config.decoder.max_positions)
        processor = dataclasses.replace(processor, max_rows=most)
    table = read_pairs(recipe.data.sources)
    alone, shared = table.rows(training.measure_together(recipe, table, processor, world))
    usable, _ = usable_samples(recipe, table, alone, processor, quiet=not world.first)
    single = dataclasses.replace(processor, threads=1)  # workers are the parallelism
    samples = run_samples(recipe, table, shared, usable, world.first)
    answers = cast(Answers, samples.table)
    loader = Loader(recipe, samples, single, model.config.decoder, world.size, world.rank)
    loader.micro_batches = PairBatches(answers, single)
    if recipe.dpo.reference == "precomputed":
        mark = hashlib.blake2b(digest_size=16)
        for part in (table.fingerprint(), processor.template.name, weights_mark(model, recipe), recipe.precision):
            mark.update(part.encode())
        measured = samples.lengths  # by tokenizer, tiles and frames; pairs left out have no value
        for column in (measured.text, measured.visual, samples.left):
            mark.update(column.tobytes())
        path = recipe.output / "references" / f"{mark.hexdigest()}.npy"
        references = reference_log_probs(recipe, model, loader, np.flatnonzero(samples.left), path, world)
        loader.micro_batches = PairBatches(answers, single, references)
    return DpoTrainer(recipe, model, loader, world)


class DpoTrainer(training.Trainer):
    """A trainer whose batches hold pairs and whose loss is a mean over them."""

    def __init__(self, recipe: Recipe, model: Llava, loader: Loader, world: World) -> None:
        super().__init__(recipe, model, loader, world)
        self.settings: Dpo = recipe.dpo or Dpo()
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        if self.settings.reference == "base" and any("lora_" not in name for name in trained):
            raise RecipeError(
                "dpo.reference: base is the model without its adapters, so nothing else may be trained: leave "
                "`trainable` empty and give `lora`, or use `reference: precomputed`"
            )
        # Where no adapter comes before the decoder's layers, both passes of a batch have the same inputs.
        self.inputs_are_the_bases = all("decoder.layers." in name for name in trained)
        self.sums = torch.zeros(len(REPORTED), device=world.device)

    def step(self, step_batch: StepBatch) -> dict[str, Any]:
        self.sums.zero_()
        values = super().step(step_batch)
        pairs = values.pop("supervised_tokens")
        means = (self.world.sum(self.sums) / pairs).tolist() if pairs else [None] * len(REPORTED)
        return values | {"pairs": pairs} | dict(zip(REPORTED, means, strict=True))

    def _count(self, prepared: Prepared) -> int:
        return len(prepared.plan.lengths)

    def _loss(self, batch: Batch, count: int, micro_batches: float) -> Tensor:
        if not batch.plan.lengths:  # no pair, but every process runs every module as often as the others
            if self.settings.reference == "base":
                with torch.no_grad(), adapters_off(self.model):
                    self._forward(batch)
            return self._forward(batch)[0].sum()
        reference, inputs = self._reference(batch)
        losses, _ = self._forward(batch, inputs_embeds=inputs)
        policy, tokens = answer_log_probs(losses, batch.plan)
        rewards = self.settings.beta * (policy - reference)
        each = preference_losses(rewards, self.settings.label_smoothing)
        sft = -policy[:, 0] / tokens[:, 0]
        with torch.no_grad():
            margin = rewards[:, 0] - rewards[:, 1]
            figures = (each, sft, rewards[:, 0], rewards[:, 1], margin, (margin > 0).float())
            self.sums += torch.stack([figure.sum() for figure in figures])
        total = (each + self.settings.sft_weight * sft).sum()
        return total * (self.world.size / max(count, 1))

    def _reference(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The reference's log-probabilities [pairs, 2] of a batch, and the decoder's inputs if they serve the policy
        too, so that tower and projector run once."""
        if self.settings.reference == "precomputed":
            return batch.weight("reference"), None
        with torch.no_grad(), adapters_off(self.model):
            losses, inputs = self._forward(batch)
        reference, _ = answer_log_probs(losses, batch.plan)
        return reference, inputs if self.inputs_are_the_bases else None


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its PEFT adapters, whether PEFT wrapped it or put them into it. Raises RecipeError if it has
    none."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise RecipeError(
            "dpo.reference: base needs PEFT: pip install 'llava_fast[train]', or use `precomputed`"
        ) from None
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise RecipeError("dpo.reference: base needs a model with adapters: give `lora`, or use `precomputed`")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:  # PEFT freezes them, and FSDP2 would keep what it sees in the first pass
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def reference_log_probs(
    recipe: Recipe, model: Llava, loader: Loader, pairs: np.ndarray, path: Path, world: World
) -> np.ndarray:
    """The starting model's log-probabilities of both answers, float32 [all pairs, 2] (NaN for those not in `pairs`, and
    for those that could not be read, if the recipe skips them).

    Made once and kept at `path`, whole or not at all; a run that is resumed reads them.
    """
    if world.sum(torch.tensor([world.first and path.exists()], dtype=torch.int32, device=world.device)).item():
        return np.load(path)
    place(model.parameters(), recipe, world)  # whole, also one that is sharded later
    found = torch.zeros(len(loader.lengths.text), 2, device=world.device)
    mine = loader.pack(pairs.tolist())[world.rank]
    batches = in_workers(loader.micro_batches, mine, recipe.data.workers)
    left_out: list[LeftOut] = []
    was_training = model.training
    model.eval()
    with tqdm(total=sum(map(len, mine)), desc="reference", unit=" pairs", disable=not world.first) as bar:
        for numbers, (prepared, _, bad) in zip(mine, batches, strict=True):
            left_out += bad
            kept = [number for number in numbers if number not in dict(bad)]
            if kept:
                losses, _ = training.forward(model, Batch.from_prepared(prepared, world.device), recipe.precision)
                found[kept] = answer_log_probs(losses, prepared.plan)[0]
            bar.update(len(numbers))
    model.train(was_training)
    for number, problem in left_out_together(recipe, world, left_out, "reference"):
        pairs = pairs[pairs != number]
        if world.first:
            logger.warning("no reference for a pair: %s", problem)
    whole = world.sum(found).cpu().numpy()
    whole[np.setdiff1d(np.arange(len(whole)), pairs)] = np.nan
    if world.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with part.open("wb") as file:
            np.save(file, whole)
        part.replace(path)
    world.together()
    return whole


def weights_mark(model: nn.Module, recipe: Recipe) -> str:
    """A hash of an even sample of each weight as `place` rounds it, adapters left out (they change nothing at the
    start)."""
    mark = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED)].to(placed_dtype(parameter, recipe)).float().cpu().numpy()
            mark.update(f"{name} {tuple(parameter.shape)}".encode() + sample.tobytes())
    return mark.hexdigest()
