"""A recipe: everything on which a training run depends, in one YAML file that is validated before anything is loaded.

Field names are the file's keys. `llava-fast train --help` shows a small recipe; recipes/ has those of the papers.
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
from llava_fast.train.objectives.stage_one import StageOne

SHIPPED = Path(__file__).parent / "recipes"


def _form_of_model(given: Any) -> str:
    return "checkpoint" if isinstance(given, str) else "parts"


Model = Annotated[Annotated[str, Tag("checkpoint")] | Annotated[Assembly, Tag("parts")], Discriminator(_form_of_model)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Data(_Section):
    """The training data. Sources are described at `train.data.samples.Source`."""

    sources: list[Source] = Field(min_length=1)
    mixing: Literal["concat", "sqrt"] = "concat"  # sqrt: shares are proportional to the square root of sizes
    template: str | None = None  # a built-in chat template, instead of the checkpoint's
    label_mask: Literal["answers", "original"] = "answers"  # original: what the original trainers supervise
    max_length: int | None = Field(None, ge=1)  # rows of a sample; default: the decoder's context length
    too_long: Literal["drop", "cut"] = "drop"
    batching: Literal["packed", "padded", "grouped"] = "packed"  # grouped: padded, in the original's groups
    on_problem: Literal["stop", "skip"] = "stop"  # for samples that cannot be used, before the run or at their step
    workers: int = Field(2, ge=0)  # processes that open and cut images
    video_frames: int = Field(16, ge=1)
    video_fps: float | None = Field(None, ge=0)  # frames a second instead; default: 1 for LLaMA-VID, else video_frames
    time_instruction: bool = False  # a video's question begins with its duration and its frames' times
    router_text: Literal["prompt", "all"] = "prompt"  # all: SliME's router reads the answers too, as in its trainer


class Optimizer(_Section):
    """AdamW, with the schedules of transformers."""

    learning_rate: float = Field(gt=0)
    rates: dict[Literal["vision_tower", "projector", "decoder"], float] = {}  # a part's own rate
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)  # share of all steps
    first_rate: float = Field(0.0, ge=0)  # at the beginning of the warm-up
    last_rate: float = Field(0.0, ge=0)  # where cosine and linear schedules end
    weight_decay: float = Field(0.0, ge=0)  # for matrices; biases and norms have none
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0)  # largest gradient norm
    states: Literal["float32", "8bit"] = "float32"


class Lora(_Section):
    """LoRA adapters on the decoder's Linears, by PEFT (Hu et al. 2021)."""

    rank: int = Field(128, ge=1)
    alpha: int = Field(256, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Parallel(_Section):
    """How several processes share the work. "auto": FSDP2 under torchrun, none in a single process."""

    kind: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    tensor: int = Field(1, ge=1)  # processes that split each decoder layer


class Checkpoints(_Section):
    every: int = Field(500, ge=1)  # optimiser steps
    keep: int = Field(2, ge=1)


class Recipe(_Section):
    """A training run."""

    model: Model  # the initial model: a checkpoint directory or Hub id, or the parts to assemble
    output: Path  # directory of checkpoints, metrics and the trained model
    trainable: list[str] = ["projector"]  # parts, or patterns of parameter names (fnmatch)
    lora: Lora | None = None
    quantize: Literal["int8", "int4"] | None = None  # the decoder's frozen Linears and its head, while loading
    dpo: Dpo | None = None  # train on preference pairs instead of supervised fine-tuning
    kto: Kto | None = None  # train on answers labelled desirable or undesirable
    stage_one: StageOne | None = None  # train BLIP-2's Q-Former on captions, without a language model
    data: Data
    optimizer: Optimizer
    batch_size: int = Field(ge=1)  # samples of an optimiser step, over all processes and micro-batches
    micro_batch: int = Field(1, ge=1)  # samples that a process runs at once (padded, grouped)
    micro_batch_rows: int | None = Field(None, ge=1)  # rows that a process runs at once (packed); default max_length
    epochs: float = Field(1, gt=0)
    steps: int | None = Field(None, ge=1)  # ends the run earlier; the learning-rate schedule covers these steps
    loss_average: Literal["step", "micro_batch"] = "step"  # micro_batch: a mean of means, as in the original trainers
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    tf32: bool = True
    recompute: Literal["none", "layers", "selective"] = "layers"  # activation checkpointing of decoder and tower
    parallel: Parallel = Parallel()
    checkpoints: Checkpoints = Checkpoints()
    layout: Literal["hf", "original"] = "hf"  # of the exported model
    spike: float | None = Field(10.0, gt=1)  # stop if the loss is this many times the median of the last 50 steps
    seed: int = 0
    tensorboard: bool = True
    wandb: str | None = None  # project

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if not self.trainable and self.lora is None:
            raise ValueError("nothing is trained: name parts under `trainable`, or give `lora`")
        if self.quantize is not None and "decoder" in self.trainable:
            raise ValueError("`quantize` freezes the decoder's weights: leave `decoder` out, or train by `lora`")
        if self.quantize is not None and (self.parallel.kind == "fsdp2" or self.parallel.tensor > 1):
            raise ValueError("`quantize` does not support sharding: use `parallel.kind: ddp`")
        if self.lora is not None and "decoder" in self.trainable:
            raise ValueError("`lora` freezes the decoder's weights: leave `decoder` out of `trainable`")
        if self.parallel.tensor > 1 and self.parallel.kind in ("none", "ddp"):
            raise ValueError(f"`parallel.tensor` above 1 needs `fsdp2`, not `{self.parallel.kind}`")
        if self.lora is not None and self.parallel.tensor > 1:
            raise ValueError("`lora` does not support `parallel.tensor`: leave it at 1; fsdp2 shards adapters too")
        if self.data.batching == "packed" and self.loss_average == "micro_batch":
            raise ValueError("`loss_average: micro_batch` needs padded batches: use `batching: grouped`")
        if self.data.batching == "grouped" and self.batch_size % self.micro_batch:
            raise ValueError("`batching: grouped` needs a batch_size that is a multiple of micro_batch")
        sections = self._objective_sections()
        if len(sections) > 1:
            raise ValueError(f"a run has one objective, but the recipe has {' and '.join(map(repr, sections))}")
        for section in sections.values():
            section.check(self)
        return self

    def objective(self) -> Objective:
        """The run's objective: that of the recipe's section, else supervised fine-tuning."""
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
    """Load a recipe from a YAML file, or a shipped recipe by name. changes: "key.key=value" strings with values in
    YAML; a number as key is an index in a list. Raises RecipeError, naming every invalid field."""
    path = find_recipe(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(shipped_recipes())
        raise RecipeError(f"there is no recipe {path}; shipped with the package: {names}") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(given, dict):
        raise RecipeError(f"{path} must be a mapping of settings, such as `model: ...`")
    for change in changes or []:
        _change(given, change)
    return parse_recipe(given, str(path))


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe, given its path or the name of a shipped recipe."""
    shipped = SHIPPED / f"{path}.yaml"
    return shipped if not Path(path).exists() and str(path) in shipped_recipes() else Path(path)


def shipped_recipes() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def parse_recipe(given: dict[str, Any], name: str = "the recipe") -> Recipe:
    """A recipe from its parsed YAML. Raises RecipeError, naming every invalid field."""
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, each['loc'])) or 'recipe'}: {_said(each)}" for each in error.errors()]
        raise RecipeError("\n".join([f"{name} is not a valid recipe:", *lines])) from None


def _said(problem: Mapping[str, Any]) -> str:
    """A field's error, reworded where pydantic's message refers to its own code."""
    if problem["type"] == "missing":
        return "it is missing"
    if problem["type"] != "extra_forbidden":
        return problem["msg"].removeprefix("Value error, ")
    sections = (Recipe, Data, Source, Optimizer, Lora, Dpo, Kto, StageOne, Parallel, Checkpoints, Assembly)
    known = [name for section in sections for name in section.model_fields]
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
    return "there is no such field" + (f"; did you mean {near[0]}?" if near else "")


def _change(given: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    *path, last = key.split(".")
    if not equals or not last:
        raise RecipeError(f"{change!r} is not key=value: write for example optimizer.learning_rate=1e-4")
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
        raise RecipeError(f"{change!r}: {name!r} is not an index of a list of {len(section)}, counted from 0")
    return int(name)
