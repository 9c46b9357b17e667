"""From a recipe to a trained model: assembles the parts of a run in order."""

from __future__ import annotations

import dataclasses
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from llava_fast.errors import RecipeError
from llava_fast.families import writing_family
from llava_fast.generation.llava import Llava
from llava_fast.inputs.processor import Processor
from llava_fast.models.fused import split_linears
from llava_fast.models.quantised import Quantised, is_quantised
from llava_fast.train.data.lengths import Lengths, measure
from llava_fast.train.data.loader import Loader
from llava_fast.train.data.run_samples import run_samples
from llava_fast.train.data.samples import SampleTable
from llava_fast.train.data.usable import usable_samples
from llava_fast.train.lora import add_adapters
from llava_fast.train.objective import Objective, processor_of
from llava_fast.train.optim import freeze
from llava_fast.train.parallel import World, is_sharded, join_world, place
from llava_fast.train.parts import part_of
from llava_fast.train.recipe import Recipe
from llava_fast.train.trainer import Trainer


def train(recipe: Recipe, resume: bool = True) -> Path:
    """Run a recipe to its end and export the model; return the model's directory (`output`/model).

    resume  True: continue from the newest checkpoint in the recipe's output, if there is one. False: raise if there is.
    Raises RecipeError, DataError or CheckpointError before the first step, TrainingError if the run must stop.
    """
    world = join_world(recipe.parallel)
    if world.first:
        check_output(recipe.output)
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    trainer = build_trainer(recipe, load_model(recipe, world), world)
    trainer.run(resume)
    return trainer.export()


def check_output(path: Path) -> None:
    """Create the output directory. Raises RecipeError if it is not writable, before training instead of at the first
    checkpoint."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RecipeError(f"output: {path} is not writable ({error.strerror}): choose another") from None


def load_model(recipe: Recipe, world: World) -> Llava:
    """The recipe's model on this process's device: trained parts in float32, the rest in the recipe's precision. A
    model to be sharded stays on the host, as stored in its checkpoint, so that no device ever holds all of it.
    """
    model = recipe.objective().load()
    writing_family(model.config, recipe.layout)  # raises before training if the model cannot be exported
    if is_quantised(model):
        _check_quantised(recipe, model, world)
    freeze(model, recipe)
    if recipe.lora is not None:
        add_adapters(model, recipe)
    if not is_sharded(recipe, world):
        place(model.parameters(), recipe, world)
    for module in model.modules():
        if isinstance(module, Quantised):
            module.to(world.device)
            module.like = module.like.to(getattr(torch, recipe.precision))
            module.in_state_dict = False
            module.exact_inputs = True
    processor = processor_of(model)
    data = recipe.data
    most = data.max_length or processor.max_rows
    decoder = model.config.decoder
    if decoder.has_learned_positions and most is not None and most > decoder.max_positions:
        raise RecipeError(f"data.max_length: the decoder has {decoder.max_positions} positions, fewer than {most}")
    fps = processor.video_fps if data.video_fps is None else data.video_fps
    model.processor = dataclasses.replace(
        processor,
        video_frames=data.video_frames,
        video_fps=fps,
        time_instruction=data.time_instruction,
        router_text=data.router_text,
        max_rows=most,
    )
    return model.train()


def _check_quantised(recipe: Recipe, model: Llava, world: World) -> None:
    """The checks of `Recipe` for `quantize`, for a checkpoint that is already quantised: its quantised weights cannot
    be trained. Raises RecipeError."""
    weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Quantised)]
    for pattern in recipe.trainable:
        if found := next((name for name in weights if part_of(name) == pattern or fnmatchcase(name, pattern)), None):
            raise RecipeError(
                f"trainable: {pattern!r} names weights that are quantised in the checkpoint ({found}): leave it out, "
                "or train by `lora`"
            )
    if is_sharded(recipe, world):
        raise RecipeError("parallel.kind: a quantised model does not support sharding: use ddp")


def build_trainer(recipe: Recipe, model: Llava, world: World) -> Trainer:
    """A trainer for the recipe's objective on the recipe's data. `model` comes from `load_model`; Linears that are
    merged for inference are split first. Raises RecipeError and DataError."""
    split_linears(model)
    objective = recipe.objective()
    loader = build_loader(recipe, model, world, objective)
    return Trainer(recipe, model, loader, world, objective)


def build_loader(recipe: Recipe, model: Llava, world: World, objective: Objective | None = None) -> Loader:
    """A loader of the recipe's data, measured and scheduled, for an objective (default: the recipe's). Raises DataError
    for invalid data."""
    objective = objective or recipe.objective()
    processor = objective.processor(model)
    table = objective.read(recipe.data.sources)
    lengths, rows = objective.lengths(table, measure_together(recipe, table, processor, world))
    usable, lengths = usable_samples(recipe, table, lengths, processor, quiet=not world.first)
    single = dataclasses.replace(processor, threads=1)  # parallelism comes from the workers
    samples = run_samples(recipe, table, rows or lengths, usable, world.first)
    loader = Loader(recipe, samples, single, model.config.decoder, world.size, world.rank)
    objective.prepare(loader, samples, single, model, world)
    return loader


def measure_together(recipe: Recipe, table: SampleTable, processor: Processor, world: World) -> Lengths:
    """The lengths of all samples, measured by the first process and read by the others."""
    if not world.first:
        world.together()  # the others wait for the first
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
