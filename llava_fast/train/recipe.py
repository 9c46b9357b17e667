"""A recipe: everything a training run depends on, in one YAML file, checked before anything is loaded.

Field names are the file's keys; `llava-fast train --help` shows a small one, and recipes/ holds those of the papers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from llava_fast.checkpoints.assemble import Assembly
from llava_fast.errors import RecipeError
from llava_fast.train.data.samples import Source
from llava_fast.train.objective import Objective, ObjectiveSettings
from llava_fast.train.objectives.dpo import Dpo
from llava_fast.train.objectives.kto import Kto
from llava_fast.train.objectives.sft import Sft

SHIPPED = Path(__file__).parent / "recipes"


def _form_of_model(given: Any) -> str:
    return "checkpoint" if isinstance(given, str) else "parts"


Model = Annotated[Annotated[str, Tag("checkpoint")] | Annotated[Assembly, Tag("parts")], Discriminator(_form_of_model)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Data(_Section):
    """What is trained on. Sources are described at `train.data.Source`."""

    sources: list[Source] = Field(min_length=1)
    mixing: Literal["concat", "sqrt"] = "concat"  # sqrt: a source's share is proportional to the root of its size
    template: str | None = None  # a built-in chat template, instead of the checkpoint's own
    label_mask: Literal["answers", "original"] = "answers"  # original: what the original trainers supervise
    max_length: int | None = Field(None, ge=1)  # rows of a sample; default: what the decoder's context holds
    too_long: Literal["drop", "cut"] = "drop"
    batching: Literal["packed", "padded", "grouped"] = "packed"  # grouped: padded, in the original's groups
    on_problem: Literal["stop", "skip"] = "stop"  # a sample that cannot be used, before or at its step
    workers: int = Field(2, ge=0)  # processes that open and cut images
    video_frames: int = Field(16, ge=1)
    time_instruction: bool = False  # a video's question begins with its duration and its frames' times


class Optimizer(_Section):
    """AdamW, with the schedules of transformers."""

    learning_rate: float = Field(gt=0)
    rates: dict[Literal["vision_tower", "projector", "decoder"], float] = {}  # a part's own rate
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)  # share of all steps
    weight_decay: float = Field(0.0, ge=0)  # of matrices; biases and norms have none
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0)  # largest gradient norm
    states: Literal["float32", "8bit"] = "float32"


class Lora(_Section):
    """Low-rank adapters on the decoder's Linears, through PEFT (Hu et al. 2021)."""

    rank: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Parallel(_Section):
    """How several processes share the work. "auto": none alone, FSDP2 under torchrun."""

    kind: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    tensor: int = Field(1, ge=1)  # processes that share each decoder layer


class Checkpoints(_Section):
    every: int = Field(500, ge=1)  # optimiser steps
    keep: int = Field(2, ge=1)


class Recipe(_Section):
    """A training run."""

    model: Model  # what to start from: a checkpoint directory or Hub id, or the parts to put together
    output: Path  # checkpoints, metrics and the trained model go here
    trainable: list[str] = ["projector"]  # parts, or patterns of parameter names (fnmatch)
    lora: Lora | None = None
    quantize: Literal["int8", "int4"] | None = None  # the decoder's frozen Linears and its head, as they are read
    dpo: Dpo | None = None  # an objective other than supervised fine-tuning: preference pairs
    kto: Kto | None = None  # ... or answers labelled desirable or undesirable
    data: Data
    optimizer: Optimizer
    batch_size: int = Field(ge=1)  # samples of an optimiser step, over all processes and micro-batches
    micro_batch: int = Field(1, ge=1)  # samples that a process runs at once (padded, grouped)
    micro_batch_rows: int | None = Field(None, ge=1)  # rows that a process runs at once (packed); default max_length
    epochs: float = Field(1, gt=0)
    steps: int | None = Field(None, ge=1)  # ends the run earlier; the schedule is laid out over these
    loss_average: Literal["step", "micro_batch"] = "step"  # micro_batch: a mean of means, as the original trainers
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    tf32: bool = True
    recompute: Literal["none", "layers", "selective"] = "layers"  # activation checkpointing of decoder and tower
    parallel: Parallel = Parallel()
    checkpoints: Checkpoints = Checkpoints()
    layout: Literal["hf", "original"] = "hf"  # of the exported model
    spike: float | None = Field(10.0, gt=1)  # stop when the loss is so many times the median of the last 50 steps
    seed: int = 0
    tensorboard: bool = True
    wandb: str | None = None  # project

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if not self.trainable and self.lora is None:
            raise ValueError("nothing is trained: name parts under `trainable`, or give `lora`")
        if self.quantize is not None and "decoder" in self.trainable:
            raise ValueError("`quantize` freezes the decoder's own weights: leave `decoder` out, or train by `lora`")
        if self.quantize is not None and (self.parallel.kind == "fsdp2" or self.parallel.tensor > 1):
            raise ValueError("`quantize` is not sharded: use `parallel.kind: ddp`, a whole model in each process")
        if self.lora is not None and "decoder" in self.trainable:
            raise ValueError("`lora` freezes the decoder's own weights: leave `decoder` out of `trainable`")
        if self.parallel.tensor > 1 and self.parallel.kind in ("none", "ddp"):
            raise ValueError(f"`parallel.tensor` above 1 goes with `fsdp2`, not with `{self.parallel.kind}`")
        if self.lora is not None and self.parallel.tensor > 1:
            raise ValueError("`lora` is not shared out by `parallel.tensor`: leave it at 1; fsdp2 shards adapters too")
        if self.data.batching == "packed" and self.loss_average == "micro_batch":
            raise ValueError("`loss_average: micro_batch` is the original's, which pads: use `batching: grouped`")
        if self.data.batching == "grouped" and self.batch_size % self.micro_batch:
            raise ValueError("`batching: grouped` deals a batch out evenly: make batch_size a multiple of micro_batch")
        sections = self._objective_sections()
        if len(sections) > 1:
            raise ValueError(f"a run has one objective, and the recipe has {' and '.join(map(repr, sections))}")
        for section in sections.values():
            section.check(self)
        return self

    def objective(self) -> Objective:
        """The run's objective: that of the section present, else supervised fine-tuning."""
        sections = self._objective_sections().values()
        return next((section.objective(self) for section in sections), None) or Sft(self)

    @classmethod
    def objective_fields(cls) -> list[str]:
        """The names of the sections that an objective can have."""
        return [name for name, field in cls.model_fields.items() if _names_an_objective(field.annotation)]

    def _objective_sections(self) -> dict[str, ObjectiveSettings]:
        values = ((name, getattr(self, name)) for name in self.objective_fields())
        return {name: value for name, value in values if value is not None}


def _names_an_objective(annotation: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, ObjectiveSettings) for kind in get_args(annotation))


def load_recipe(path: str | Path, changes: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file, or one that comes with the package by its name. `changes` are "key.key=value"
    strings, values in YAML; a number is a place in a list. Raises RecipeError, naming every field that is wrong."""
    path = find_recipe(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(shipped_recipes())
        raise RecipeError(f"there is no recipe at {path}; those that come with the package: {names}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(given, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, such as `model: ...`")
    for change in changes or []:
        _change(given, change)
    return parse_recipe(given, str(path))


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package."""
    shipped = SHIPPED / f"{path}.yaml"
    return shipped if not Path(path).exists() and str(path) in shipped_recipes() else Path(path)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def parse_recipe(given: dict[str, Any], name: str = "the recipe") -> Recipe:
    """A recipe from its parsed YAML. Raises RecipeError, naming every field that is wrong."""
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, each['loc'])) or 'recipe'}: {_said(each)}" for each in error.errors()]
        raise RecipeError("\n".join([f"{name} is not a recipe that can be run:", *lines])) from None


def _said(problem: Mapping[str, Any]) -> str:
    """A field's error, reworded where pydantic's message refers to its own code."""
    if problem["type"] == "missing":
        return "it is missing"
    if problem["type"] != "extra_forbidden":
        return problem["msg"].removeprefix("Value error, ")
    sections = (Recipe, Data, Source, Optimizer, Lora, Dpo, Kto, Parallel, Checkpoints, Assembly)
    known = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
    return "there is no such field" + (f"; did you mean {near[0]}?" if near else "")


def _change(given: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    *path, last = key.split(".")
    if not equals or not last:
        raise RecipeError(f"{change!r} changes nothing: write key=value, as optimizer.learning_rate=1e-4")
    section: Any = given
    for name in path:
        section = section.setdefault(name, {}) if isinstance(section, dict) else section[_place(section, name, change)]
        if not isinstance(section, (dict, list)):
            raise RecipeError(f"{change!r}: {name} is not a section of the recipe")
    try:
        section[last if isinstance(section, dict) else _place(section, last, change)] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{change!r}: the value is not YAML ({' '.join(str(error).split())})") from None


def _place(section: list, name: str, change: str) -> int:
    if not name.isdecimal() or int(name) >= len(section):
        raise RecipeError(f"{change!r}: {name!r} is no place in a list of {len(section)}, counted from 0")
    return int(name)
