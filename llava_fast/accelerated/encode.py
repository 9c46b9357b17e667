"""From a Hugging Face LLaVA's images and videos to the decoder's inputs: runs the tower up to the selected layer,
projects only rows that are used, and places every row by integer indices.

`unfit` returns why a model or a call must take the stock path; the other functions assume that it returned None.
"""

from __future__ import annotations

import contextvars
import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_fast.accelerated.stock import StockModel
from llava_fast.accelerated.uint8_pixels import Normalisation
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families import FAMILIES
from llava_fast.families.llava import Llava
from llava_fast.inputs.pictures.preprocessing import may_fold
from llava_fast.inputs.plan.from_ids import Integers, placement_columns, rows_of_images
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.video import video_rows
from llava_fast.models.connectors.base import PlainLinears
from llava_fast.models.encode import Parts, inputs_embeds, joined, placed, project_rows, visual_rows
from llava_fast.models.fused.gate import is_plain, is_untouched
from llava_fast.models.placement import Placement, to_device
from llava_fast.models.towers.vit import on_device
from llava_fast.ops import patch_embed
from llava_fast.ops.activations import ACTIVATIONS

ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
POOLS = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}
TOWERS = ("transformers.models.clip.modeling_clip", "transformers.models.siglip.modeling_siglip")
TOWER_RUNS: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("llava_fast_tower_runs", default=None)
"""In a self-check: the number of layers of each tower run by this module, which proves that it ran."""


class Unfit(Exception):
    """Raised internally when a call must take the stock path; never reaches the caller."""


class Selection(NamedTuple):
    """Which of the tower's hidden states are used: the number of layers to run, and of rows to skip in each tile."""

    layers: int
    skipped: int


def untouched(module: nn.Module) -> bool:
    """Whether a module has no hooks and no overridden forward, so that calling its parts is equivalent to calling
    it."""
    return is_untouched(module, type(module))


def only_gathered(module: nn.Module) -> bool:
    """Whether a module has no overridden forward and no hooks except those of FSDP2 (`fully_shard`), which gather and
    free its weights.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    owners = (type(getattr(hook, "__self__", None)).__module__ for hook in hooks)
    return "forward" not in vars(module) and all(owner.startswith("torch.distributed.fsdp.") for owner in owners)


def unfit(model: StockModel, given: dict) -> str | None:
    """Why this call of an inner LLaVA model (its forward, get_image_features or get_video_features) must take the stock
    path, or None. `given` has pixels under the stock names."""
    asked = [name for name in ("output_hidden_states", "output_attentions") if _asked(model, given, name)]
    if asked:
        return f"{' and '.join(asked)} asked for"
    return_dict = given.get("return_dict")
    if not (model.config.return_dict if return_dict is None else return_dict):
        return "a tuple is asked for (return_dict=False)"
    layer = _option(model, given, "vision_feature_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        return f"a list of feature layers is asked for ({layer!r})"
    for name in ("inputs_embeds", "mm_encoder_outputs"):
        if given.get(name) is not None:
            return f"{name} is given"
    pixels, frames, ids = given.get("pixel_values"), given.get("pixel_values_videos"), given.get("input_ids")
    anyres = model.config.model_type in ANYRES
    if not anyres and given.get("image_sizes") is not None:
        return "image_sizes is given"
    if pixels is not None:
        if anyres and given.get("image_sizes") is None:
            return "image_sizes is not given"
        if pixels.dim() not in ((4, 5) if anyres else (4,)) or not len(pixels):
            return f"pixel_values of shape {tuple(pixels.shape)}"
    tower = model.vision_tower
    if not any(kind.__module__ in TOWERS for kind in type(tower).__mro__):
        return f"the vision tower is a {type(tower).__name__}, and only CLIP's and SigLIP's are known"
    visual = [part for part in (pixels, frames) if part is not None]
    parts = [*visual, *tower.embeddings.parameters(), *model.get_input_embeddings().parameters()]
    devices = {str(part.device) for part in parts} | ({str(ids.device)} if ids is not None else set())
    if len(devices) > 1:
        return f"the model and its inputs are on several devices ({', '.join(sorted(devices))})"
    if not only_gathered(tower) or not untouched(tower.encoder):
        return "the vision tower is hooked or wrapped"
    depth = len(tower.encoder.layers)
    if not -depth - 1 <= layer <= depth:
        return f"vision_feature_layer {layer} of a tower with {depth} layers"
    if layer in (-1, depth) and getattr(tower.config, "tie_last_hidden_states", None):
        return "the tower's last hidden state is tied to its last LayerNorm"
    return None if frames is None else _unfit_for_videos(model, frames, select(model, given).skipped)


def _unfit_for_videos(model: StockModel, frames: Tensor, skipped: int) -> str | None:
    if frames.dim() != 5 or not frames.numel():
        return f"pixel_values_videos of shape {tuple(frames.shape)}"
    if hasattr(model.vision_tower.embeddings, "class_embedding") and not skipped:
        return "a video with the tower's class row"
    if model.config.model_type == "llava_next_video":
        pooler, kind = model.vision_resampler, POOLS.get(model.config.spatial_pool_mode)
        if kind is None or not untouched(pooler) or not is_untouched(pooler.pool, kind):
            return "the pooler of videos is hooked, wrapped or has weights"
    return None


def _asked(model: StockModel, given: dict, name: str) -> bool:
    """Whether an output is requested by an argument or, without one, by the model's or its decoder's config."""
    value = given.get(name)
    if value is None:
        config = model.config
        value = getattr(config, name, False) or getattr(getattr(config, "text_config", None), name, False)
    return value is not False


def _option(model: StockModel, given: dict, name: str):
    value = given.get(name)
    return getattr(model.config, name) if value is None else value


def select(model: StockModel, given: dict) -> Selection:
    layer = _option(model, given, "vision_feature_layer")
    depth = len(model.vision_tower.encoder.layers)
    skipped = _option(model, given, "vision_feature_select_strategy") == "default"
    return Selection(layer if layer >= 0 else depth + 1 + layer, int(skipped))


def geometry(config, skipped: int, has_class_row: bool, aspect_ratio: str | None = None) -> VisualGeometry:
    """The geometry of a checkpoint's images and videos, without `skipped` rows of each tile. aspect_ratio: LLaVA-
    OneVision's "anyres_max_N", default its config's. Raises ImageError for a layout that the stock code does not
    support either.
    """
    vision = config.vision_config
    if skipped and not has_class_row:
        raise ImageError("feature selection 'default' drops a patch of a tower without a class row")
    rows: dict[str, Any] = {"class_rows": int(has_class_row and not skipped), "dropped_rows": skipped}
    return VisualGeometry(vision.image_size, vision.patch_size, **rows, **tiling(config, aspect_ratio))


def tiling(config, aspect_ratio: str | None = None) -> dict[str, Any]:
    """The fields of VisualGeometry that the family reads from a config; empty for an unknown pooler. Raises
    ImageError.
    """
    family, file = FAMILIES[config.model_type](), Path("config.json")
    assert isinstance(family, Llava)
    if aspect_ratio is not None:
        config = copy.copy(config)
        config.vision_aspect_ratio = aspect_ratio
    try:
        pools = getattr(config, "spatial_pool_mode", None) in POOLS or config.model_type != "llava_next_video"
        return family.tiling(config, file) | (family.pooling(config, file) if pools else {})
    except CheckpointError as error:
        raise ImageError(str(error)) from error


class Visuals(NamedTuple):
    """A call's images and videos: the tiles of images and the frames of videos [tiles, 3, H, W] by argument name, the
    placement of their rows, the decoder rows of images and videos (int32), the number of rows of each image (or of each
    video if there are no images), if known on the host, and the number of videos."""

    tiles: dict[str, Tensor]
    placement: Placement
    place: Tensor
    video_place: Tensor
    lengths: list[int]
    videos: int


def plan_visuals(model: StockModel, given: Mapping[str, Any], integers: Integers, selection: Selection) -> Visuals:
    """A call's images and videos, and the placement of their rows. Raises ImageError if pixels, sizes and tokens do not
    match."""
    has_class_row = hasattr(model.vision_tower.embeddings, "class_embedding")
    shape = geometry(model.config, selection.skipped, has_class_row, given.get("vision_aspect_ratio"))
    pixels, frames = given.get("pixel_values"), given.get("pixel_values_videos")
    tiles, images, videos = {}, [], []
    if pixels is not None:
        anyres = shape.aspect == "anyres"
        count = len(pixels) if integers.sizes is None else len(integers.sizes)
        images = rows_of_images(shape, integers.sizes if anyres else None, count, integers.counts)
        tiles["pixel_values"] = _tiles(pixels, [rows.tiles for rows in images])
    if frames is not None:
        videos = [video_rows(shape, frames.shape[1])] * len(frames)
        tiles["pixel_values_videos"] = frames.flatten(0, 1)
    config = model.config
    tokens = config.image_token_id, getattr(config, "video_token_id", None)
    columns, pools = placement_columns(
        images, integers.ids, tokens[0], shape.tower_rows_per_tile, videos, tokens[1], torch.is_grad_enabled()
    )
    device = next(iter(tiles.values())).device
    at = to_device(columns, device)
    lengths = [len(rows) for rows in images or videos]
    return Visuals(tiles, Placement.of(at.get, pools), at["place"], at["video_place"], lengths, len(videos))


def _tiles(pixels: Tensor, counts: list[int]) -> Tensor:
    """The tiles of all images, concatenated, without the padding tiles of [images, most, 3, H, W]."""
    if pixels.dim() == 5:
        if len(pixels) != len(counts) or max(counts) > pixels.shape[1]:
            raise ImageError(f"pixel_values {tuple(pixels.shape)} do not hold {len(counts)} images of {counts} tiles")
        pixels = torch.cat([tiles[:number] for tiles, number in zip(pixels, counts, strict=True)])
    if len(pixels) != sum(counts):
        raise ImageError(f"{len(pixels)} tiles are given, but the images have {sum(counts)}")
    return pixels


class Features(NamedTuple):
    """A tower's output: the hidden states [tiles, rows, width] of the selected layer and, if requested, its last hidden
    state.
    """

    selected: Tensor
    last: Tensor | None


def tower_features(
    tower: StockModel, tiles: Mapping[str, Tensor], layers: int, uint8: Mapping[str, Normalisation], last: bool = False
) -> Features:
    """Hidden states after this many layers; later layers run only if the `last` hidden state is requested. uint8: name
    of tiles -> the normalisation that they still need.
    """
    if (runs := TOWER_RUNS.get()) is not None:
        runs.append(layers)
    if untouched(tower):
        return _hidden_states(tower, tiles, layers, uint8, last)
    # FSDP2 gathers the weights when the tower is called, so call the tower itself.
    own = tower.__dict__
    own["forward"] = functools.partial(_hidden_states, tower)
    try:
        return tower(tiles, layers, uint8, last)
    finally:
        del own["forward"]


def _hidden_states(
    tower: StockModel, tiles: Mapping[str, Tensor], layers: int, uint8: Mapping[str, Normalisation], last: bool
) -> Features:
    each = [_embedded(tower.embeddings, pixels, uint8.get(name)) for name, pixels in tiles.items()]
    hidden, is_clip = joined(each), hasattr(tower, "pre_layrnorm")
    if is_clip:
        hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:layers]:
        hidden = layer(hidden, None)
    if not last:
        return Features(hidden, None)
    end = hidden
    for layer in tower.encoder.layers[layers:]:
        end = layer(end, None)
    return Features(hidden, end if is_clip else tower.post_layernorm(end))  # CLIP normalises only the class row


def _embedded(embeddings: StockModel, pixels: Tensor, normalisation: Normalisation | None) -> Tensor:
    """[tiles, rows, width]; the normalisation is folded into the patch embedding's weight if that is a plain Conv2d."""
    if normalisation is None:
        return embeddings(pixels, interpolate_pos_encoding=False)
    conv, position = embeddings.patch_embedding, embeddings.position_embedding
    plain = is_plain(embeddings, type(embeddings)) and type(embeddings).__module__ in TOWERS
    plain = plain and may_fold(normalisation.folded()[1])
    if plain and is_plain(conv, nn.Conv2d) and is_plain(position, nn.Embedding):
        class_row = getattr(embeddings, "class_embedding", None)
        weights = [part for part in (position.weight, conv.bias, class_row) if part is not None]
        if all(part.dtype == conv.weight.dtype for part in weights):
            mean, std = (on_device(part, pixels.device) for part in normalisation.folded())
            return patch_embed(
                pixels, conv.weight, position.weight, mean=mean, std=std, bias=conv.bias, class_row=class_row
            )
    return embeddings(normalisation.normalised(pixels), interpolate_pos_encoding=False)


def view(model: StockModel, visuals: Visuals, skipped: int) -> Parts:
    """A transformers model's Parts, for models.encode."""
    projector = model.multi_modal_projector
    if all(untouched(part) for part in projector.modules()):
        project = functools.partial(project_rows, projector)
    else:
        project = functools.partial(_projected_as_stock, projector, visuals, skipped)
    newline = getattr(model, "image_newline", None)
    return Parts(newline, project, functools.partial(projector_linears, model))


def _projected_as_stock(
    projector: nn.Module, visuals: Visuals, skipped: int, features: Tensor, kept: Tensor, pooled: list[Tensor]
) -> Tensor:
    """Kept rows, then pooled rows, for a projector with hooks. It is called with the stock model's inputs: all tiles of
    images, then all frames of videos.
    """
    tiles = [len(part) for part in visuals.tiles.values()]
    features = features.unflatten(0, (sum(tiles), -1))
    rows = features.shape[1]
    parts = dict(zip(visuals.tiles, features.split(tiles), strict=True))
    frames = parts.pop("pixel_values_videos") if pooled else ()
    done = [projector(part[:, skipped:]).flatten(0, 1) for part in parts.values()]
    picked = [torch.cat(done)[kept - (kept // rows + 1) * skipped]] if done else []
    return joined(picked + [projector(part.unflatten(0, (len(frames), -1))).flatten(0, 1) for part in pooled])


def feature_list(
    model: StockModel, visuals: Visuals, selection: Selection, uint8: Mapping[str, Normalisation]
) -> list[Tensor]:
    """The pooler_output of the stock get_image_features: each image's (or video's) rows in order, [rows, width]."""
    features = tower_features(model.vision_tower, visuals.tiles, selection.layers, uint8).selected.flatten(0, 1)
    parts, at = view(model, visuals, selection.skipped), visuals.placement
    return list(placed(parts, None, visual_rows(parts, features, at), at).split(visuals.lengths))


class Embedded(NamedTuple):
    """The decoder's inputs [B, S, width] and their sources: the tower's features and layer, the decoder rows of images
    and videos, and the dtype of the projector's output."""

    embeds: Tensor
    features: Features
    selection: Selection
    visuals: Visuals
    dtype: torch.dtype


def decoder_inputs(
    model: StockModel,
    ids: Tensor,
    visuals: Visuals,
    selection: Selection,
    uint8: Mapping[str, Normalisation],
    last: bool,
) -> Embedded:
    """Decoder inputs: text rows from the embedding, visual rows from tower and projector (see models.encode). last: run
    all layers of the tower."""
    made = tower_features(model.vision_tower, visuals.tiles, selection.layers, uint8, last)
    parts = view(model, visuals, selection.skipped)
    embedding, rows = model.get_input_embeddings(), made.selected.flatten(0, 1)
    flat, dtype = inputs_embeds(parts, embedding, rows, visuals.placement, ids)
    return Embedded(flat.view(*ids.shape, -1), made, selection, visuals, dtype)


def projector_linears(model: StockModel) -> PlainLinears | None:
    """The Linears of a projector that has not been changed since transformers built it, else None."""
    projector = model.multi_modal_projector
    linears = [projector.linear_1, projector.linear_2] if hasattr(projector, "linear_2") else []
    if not linears or not untouched(projector) or not untouched(projector.act):
        return None
    if not type(projector).__module__.startswith("transformers."):
        return None  # a wrapper forwards the attributes of the wrapped module
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return None
    activation = model.config.projector_hidden_act
    return PlainLinears.of(linears, activation) if activation in ACTIVATIONS else None
