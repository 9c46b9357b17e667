"""`llava-fast plan`: estimates the cost of a run from its recipe and the model's config.

Nothing is measured and no weights are read. Every figure states its formula, so that it can be checked by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from llava_fast.checkpoints.assemble import Assembly, describe
from llava_fast.checkpoints.quantised import scheme_of
from llava_fast.errors import DataError, RecipeError
from llava_fast.families import read_config
from llava_fast.inputs.tiling.anyres import image_rows
from llava_fast.models.config import LlavaConfig
from llava_fast.models.quantised import Quantisation
from llava_fast.models.quantised import plan as quantisation_plan
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops.linear_cross_entropy.chunked import CHUNK_BYTES
from llava_fast.storage.files import read_json
from llava_fast.storage.hub import resolve
from llava_fast.train.data.mixture import epoch_counts
from llava_fast.train.estimate.flops import GPUS, Forward, forward_flops, peak_flops, step_flops
from llava_fast.train.optim import freeze
from llava_fast.train.parts import PARTS, part_of
from llava_fast.train.recipe import Recipe

KNOWN_DECODERS = Path(__file__).parent / "known_decoders.json"
"""The config.json of decoders that recipes name, for planning without network access."""

USUAL_IMAGE = (768, 1024)
"""Assumed height and width of a sample's image, by default."""


@dataclass(frozen=True)
class Figure:
    """One line of a plan: name, value, unit and formula."""

    what: str
    value: float
    unit: str
    how: str


@dataclass(frozen=True)
class Sample:
    """An assumed mean sample: decoder rows, image tiles, supervised rows, rows of text that the connector reads with
    each tile."""

    rows: int
    tiles: int
    supervised: int
    how: str
    instruction: int = 0


@dataclass(frozen=True)
class CostPlan:
    """Figures by section, in order; the totals are `total_memory` (bytes per GPU) and `hours` (None: unknown)."""

    sections: dict[str, list[Figure]]
    total_memory: float
    hours: float | None

    def to_text(self) -> str:
        lines: list[str] = []
        for title, figures in self.sections.items():
            lines += ["", title] if lines else [title]
            lines += [f"  {each.what:<30}{_shown(each.value, each.unit):>14}   {each.how}" for each in figures]
        return "\n".join(lines)


def plan(
    recipe: Recipe,
    gpus: int,
    gpu: str = "A100-80G",
    samples: int | None = None,
    rows: int | None = None,
    tiles: int | None = None,
    share: float = 0.4,
) -> CostPlan:
    """The cost of a recipe on `gpus` GPUs of a type (see flops.GPUS).

    samples  samples per epoch; default: counted in the recipe's data if it exists here, else hours are unknown.
    rows     decoder rows of a mean sample; tiles: its image tiles; default: one 1024x768 image and a text.
    share    assumed share of the GPU's peak FLOP/s (not measured).
    Raises RecipeError for an unknown GPU, CheckpointError for a model that cannot be described.
    """
    if gpu not in GPUS:
        raise RecipeError(f"no figures are known of a GPU {gpu!r}: choose one of {', '.join(GPUS)}")
    config = config_of(recipe.model)
    counts = count_parameters(config, recipe)
    sample = _sample(config, recipe, rows, tiles)
    if samples is None:
        samples = _count_samples(recipe)
    memory = _memory(config, recipe, counts, sample, gpus)
    total = sum(each.value for each in memory)
    fits = "fits" if total <= GPUS[gpu].memory else "DOES NOT FIT"
    memory.append(Figure("all", total, "B", f"{fits} in the {_shown(GPUS[gpu].memory, 'B')} of an {gpu}"))
    time, hours = _time(config, recipe, counts, sample, samples, gpus, gpu, share)
    sections = {
        "Parameters": _parameters(counts),
        "A sample": [
            Figure("decoder rows", sample.rows, "", sample.how),
            Figure("image tiles", sample.tiles, "", f"of {config.vision.image_size} pixels"),
            *_instruction(sample),
        ],
        f"Memory of each of {gpus} GPUs": memory,
        "Time": time,
    }
    return CostPlan(sections, total, hours)


def _instruction(sample: Sample) -> list[Figure]:
    how = "rows of text that the connector reads with each tile: assumed, the text that is not the answer"
    return [Figure("question", sample.instruction, "", how)] if sample.instruction else []


def config_of(model: str | Assembly) -> LlavaConfig:
    """The config of a recipe's model. Downloads only the small files of a Hub repository, and nothing for the decoders
    in KNOWN_DECODERS. Raises CheckpointError."""
    if isinstance(model, Assembly):
        known = json.loads(KNOWN_DECODERS.read_text(encoding="utf-8"))
        here = Path(model.decoder).expanduser()
        if not here.is_dir() and here.name in known:
            return describe(model, known[here.name], here)[0]
        path = resolve(model.decoder, only=["*.json"])
        return describe(model, read_json(path / "config.json"), path)[0]
    return read_config(resolve(model, only=["*.json"]))[0]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part: all and trained ones, those of adapters, and those of the largest sharded
    units."""

    all: dict[str, int]
    trained: dict[str, int]
    adapters: int
    layer: int  # the largest decoder layer
    outside: int  # everything but decoder layers and tower: embedding, head, projector
    head: int
    quantised: int = 0  # parameters in 8 or 4 bits
    quantised_bytes: float = 0  # their bytes, scales included
    scheme: str = ""  # of most of them


def count_parameters(config: LlavaConfig, recipe: Recipe) -> ParameterCounts:
    """Count the parameters of a model on the meta device, frozen according to the recipe. Raises RecipeError for a name
    that matches no part.
    """
    with torch.device("meta"):
        model = LlavaModel(config)
    freeze(model, recipe)
    everything, trained = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        everything[part_of(name)] += parameter.numel()
        trained[part_of(name)] += parameter.numel() * parameter.requires_grad
    adapters = 0
    if recipe.lora is not None:
        for name, module in model.decoder.named_modules():
            if name.rpartition(".")[2] in recipe.lora.targets and isinstance(module, torch.nn.Linear):
                adapters += recipe.lora.rank * (module.in_features + module.out_features)
    quantisation = scheme_of(config.source) if recipe.quantize is None else Quantisation(recipe.quantize)
    roundings = {} if quantisation is None else quantisation_plan(model, quantisation)
    parameters = dict(model.named_parameters())
    quantised = {name: parameters[f"{name}.weight"] for name in roundings}
    bits = sum(roundings[name].bits(weight.shape[1]) * weight.numel() for name, weight in quantised.items())
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.decoder.layers]
    return ParameterCounts(
        everything,
        trained,
        adapters,
        max(layers, default=0),
        outside=everything["decoder"] - sum(layers) + everything["projector"],
        head=config.decoder.vocab_size * config.decoder.hidden_size,
        quantised=sum(weight.numel() for weight in quantised.values()),
        quantised_bytes=bits / 8,
        scheme=quantisation.scheme if quantisation else "",
    )


def _parameters(counts: ParameterCounts) -> list[Figure]:
    figures = [Figure(part, counts.all[part], "", f"{_shown(counts.trained[part], '')} trained") for part in PARTS]
    if counts.adapters:
        figures.append(Figure("adapters", counts.adapters, "", "rank x (in + out) of each target; all trained"))
    return figures


def _sample(config: LlavaConfig, recipe: Recipe, rows: int | None, tiles: int | None) -> Sample:
    visual = image_rows(config.geometry, *USUAL_IMAGE)
    plain = recipe.data.template in ("plain", "v0_plain")
    text = recipe.objective().usual_text or (40 if plain else 250)
    supervised = text if plain else text // 2
    pair = supervised * (recipe.objective().branches - 1)
    if rows is None:
        rows = len(visual) + text + pair
        how = f"assumed: {len(visual)} of a 1024x768 image, {text} of text" + f", {pair} of a second answer" * bool(
            pair
        )
    else:
        how = "as given"
    if recipe.data.max_length is not None and rows > recipe.data.max_length:
        rows, how = recipe.data.max_length, f"max_length ({how} {rows})"
    told = text - supervised if config.projector.reads_text else 0
    return Sample(rows, visual.tiles if tiles is None else tiles, min(supervised + pair, rows), how, told)


def _count_samples(recipe: Recipe) -> int | None:
    """The number of samples per epoch, or None if the data does not exist here."""
    try:
        table = recipe.objective().read(recipe.data.sources)
    except DataError:
        return None
    sizes = np.bincount(table.source_of, minlength=len(recipe.data.sources))
    return int(epoch_counts(sizes, recipe.data.sources, recipe.data.mixing).sum())


def _memory(config: LlavaConfig, recipe: Recipe, counts: ParameterCounts, sample: Sample, gpus: int) -> list[Figure]:
    """The memory of one GPU, item by item, in bytes."""
    kind, narrow = _kind(recipe, gpus), 2 if recipe.precision == "bfloat16" else 4
    trained = sum(counts.trained.values()) + counts.adapters
    everything = sum(counts.all.values()) + counts.adapters
    tower_runs_alone = not counts.trained["vision_tower"]
    state = 8 if recipe.optimizer.states == "float32" else 2
    if kind == "fsdp2":
        whole = counts.all["vision_tower"] if tower_runs_alone else 0
        figures = [
            Figure("weights, sharded", 4 * (everything - whole) / gpus, "B", f"4 bytes each, over {gpus} GPUs"),
            Figure("frozen tower", narrow * whole, "B", f"{narrow} bytes each, replicated on every GPU"),
            Figure("gradients", 4 * trained / gpus, "B", f"4 bytes of each trained weight, over {gpus} GPUs"),
            Figure("AdamW", state * trained / gpus, "B", f"{state} bytes of each trained weight, over {gpus} GPUs"),
            _gathered(recipe, counts, narrow, tower_runs_alone),
        ]
    else:
        figures = [
            Figure("trained weights", 4 * trained, "B", "float32"),
            Figure("frozen weights", narrow * (everything - trained - counts.quantised), "B", f"{narrow} bytes each"),
            Figure("quantised weights", counts.quantised_bytes, "B", f"{counts.scheme}, with their scales"),
            Figure("gradients", 4 * trained, "B", "float32"),
            Figure("AdamW", state * trained, "B", f"{state} bytes of each trained weight"),
        ]
        if kind == "ddp":
            figures.append(Figure("DDP's buckets", 4 * trained, "B", "a second copy of the gradients"))
        if narrow == 2:
            figures.append(Figure("weights in bfloat16", 2 * trained, "B", "autocast keeps them for a forward pass"))
    rows, how = _micro_batch(config, recipe, sample)
    tiles = math.ceil(rows / sample.rows * sample.tiles)
    figures += _activations(config, recipe, counts, rows, tiles, tiles * sample.instruction, how, narrow)
    chunk = CHUNK_BYTES * (2 + narrow / 4)
    gradient = 4 * counts.head if counts.trained["decoder"] else 0
    figures += [
        Figure(
            "loss",
            chunk + gradient,
            "B",
            "a chunk of logits and its gradient" + ", the head's in float32" * bool(gradient),
        ),
        Figure("CUDA, NCCL, fragments", 2 * 2**30, "B", "assumed"),
    ]
    return [each for each in figures if each.value]


def _gathered(recipe: Recipe, counts: ParameterCounts, narrow: int, tower_runs_alone: bool) -> Figure:
    tensor = recipe.parallel.tensor
    units = counts.outside + 2 * counts.layer / tensor
    units += 0 if tower_runs_alone else counts.all["vision_tower"]
    gradients = 4 * max(counts.outside * bool(counts.trained["decoder"]), counts.layer / tensor)
    how = "embedding, head, projector, two decoder layers; the largest unit's gradients in float32"
    return Figure("gathered weights", narrow * units + gradients, "B", how)


def _kind(recipe: Recipe, gpus: int) -> str:
    kind = recipe.parallel.kind
    return "none" if gpus == 1 else "fsdp2" if kind == "auto" else kind


def _micro_batch(config: LlavaConfig, recipe: Recipe, sample: Sample) -> tuple[int, str]:
    """(decoder rows of a micro-batch, formula)."""
    longest = recipe.data.max_length or config.decoder.context_length
    if recipe.data.batching == "packed":
        if recipe.micro_batch_rows is not None:
            return recipe.micro_batch_rows, f"{recipe.micro_batch_rows:,} rows (micro_batch_rows)"
        return longest, f"{longest:,} rows (the longest sample)"
    rows = recipe.micro_batch * sample.rows
    return rows, f"{rows:,} rows: {recipe.micro_batch} samples of mean length, more if longer ones are batched"


def _activations(
    config: LlavaConfig,
    recipe: Recipe,
    counts: ParameterCounts,
    rows: int,
    tiles: int,
    instruction: int,
    how: str,
    narrow: int,
) -> list[Figure]:
    """Saved activations of a forward pass, and the working memory of one layer."""
    decoder, vision = config.decoder, config.vision
    width = decoder.hidden_size
    whole, products = decoder.kept_per_row(narrow)
    kept, what = {
        "none": (whole, "everything that a layer's backward pass reads"),
        "layers": (narrow * width, "each layer's input"),
        "selective": (products, "each layer's input and products"),
    }[recipe.recompute]
    figures = [Figure("decoder, kept", decoder.num_layers * rows * kept, "B", f"{what}, {how}")]
    if recipe.recompute != "none":
        figures.append(Figure("decoder, working", rows * whole, "B", "one layer, recomputed"))
    patches = tiles * vision.rows_per_tile
    layer = narrow * vision.kept_per_row
    if counts.trained["vision_tower"]:
        each = layer if recipe.recompute == "none" else narrow * vision.hidden_size
        figures.append(Figure("tower, kept", vision.layers_needed * patches * each, "B", f"{tiles:,} tiles"))
    figures.append(Figure("tower, working", patches * layer, "B", f"one layer over {tiles:,} tiles"))
    figures.append(Figure("last norm, saved", rows * width * (4 + narrow), "B", "its input in float32, and its output"))
    if counts.trained["vision_tower"] or counts.trained["projector"]:
        each = narrow * config.projector.kept_per_row(bool(counts.trained["projector"]))
        how = f"features and hidden rows of {tiles:,} tiles, if unpadding drops none"
        figures.append(Figure("projector, kept", tiles * config.projected_per_tile * each, "B", how))
        told = narrow * instruction * config.projector.kept_per_text_row
        figures.append(Figure("projector, kept of text", told, "B", f"{instruction:,} rows of questions"))
    pixels = 3 * vision.image_size**2
    figures.append(Figure("tiles", tiles * pixels, "B", "uint8 pixels"))
    return figures


def _time(
    config: LlavaConfig,
    recipe: Recipe,
    counts: ParameterCounts,
    sample: Sample,
    samples: int | None,
    gpus: int,
    gpu: str,
    share: float,
) -> tuple[list[Figure], float | None]:
    trained = {part for part in PARTS if counts.trained[part]}
    shape = ([sample.rows], sample.tiles)
    told = sample.tiles * sample.instruction
    forward = forward_flops(config, *shape, sample.supervised, instruction=told)
    model = step_flops(config, *shape, trained, sample.supervised, adapters=counts.adapters, instruction=told)
    again = _recomputed(forward, recipe, bool(counts.trained["vision_tower"]))
    peak = peak_flops(GPUS[gpu], recipe.precision, recipe.tf32)
    speed = gpus * peak * share
    objective = recipe.objective()
    beside = sum(forward) * objective.passes_beside
    step = recipe.batch_size * (model + again + beside)
    figures = [
        Figure(
            "forward pass of a sample", sum(forward), "FLOP", "2 per weight and row; attention 4 x width per row pair"
        ),
        Figure("training on a sample", model, "FLOP", "forward and backward, down to the first trained part"),
        Figure("recomputed", again, "FLOP", f"recompute: {recipe.recompute}, and the loss's logits"),
        Figure("a step", step, "FLOP", f"{recipe.batch_size} samples"),
        Figure("achieved", speed, "FLOP/s", f"assumed: {share:.0%} of {gpus} x {peak / 1e12:.0f} TFLOP/s ({gpu})"),
        Figure("a step", step / speed, "s", "the two figures above"),
    ]
    if beside:
        figures.insert(3, Figure("without gradients", beside, "FLOP", f"{objective.passes_beside} more forward passes"))
    if recipe.steps is None and samples is None:
        figures.append(Figure("hours", math.nan, "", "unknown: the data is not here; give --samples"))
        return figures, None
    steps = math.ceil(math.ceil(samples / recipe.batch_size) * recipe.epochs) if samples is not None else math.inf
    steps = min(steps, recipe.steps or math.inf)
    hours = steps * step / speed / 3600
    how = f"{samples:,} samples x {recipe.epochs:g} epochs" if samples is not None else "the recipe's steps"
    figures.append(Figure("steps", steps, "", how))
    if objective.passes_before and samples is not None:
        first = objective.passes_before * samples * sum(forward) / speed / 3600
        figures.append(Figure("the reference", first, "h", "one forward pass over all samples"))
        hours += first
    figures.append(Figure("hours", hours, "h", "at this speed, if data loading and network keep up"))
    return figures, hours


def _recomputed(forward: Forward, recipe: Recipe, tower_trained: bool) -> float:
    """FLOPs recomputed in the backward pass, which do not count as the model's."""
    again = forward.head  # see ops.linear_cross_entropy
    if recipe.recompute == "layers":
        again += forward.decoder + forward.decoder_attention
        again += (forward.tower + forward.tower_attention) * tower_trained
    if recipe.recompute == "selective":
        again += forward.decoder_attention + forward.tower_attention * tower_trained
    return again


_SCALES: dict[str, Callable[[float], str]] = {
    "B": lambda value: f"{value / 2**30:,.1f} GiB" if value >= 2**28 else f"{value / 2**20:,.0f} MiB",
    "s": lambda value: f"{value:,.2f} s",
    "h": lambda value: f"{value:,.1f} h",
}


def _shown(value: float, unit: str) -> str:
    if unit in _SCALES:
        return _SCALES[unit](value)
    if math.isnan(value):
        return "?"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.2f} {letter}{unit}"
    return f"{value:,.0f} {unit}".rstrip()
