"""The plan of a batch as flat int32 tensors named `llava_plan_*`, made by the collator, so that an accelerated model's
forward reads no tensor values and does not synchronise with the device.

On a GPU only shapes are checked. On a CPU, where reading values is free, it is also checked that the plan belongs to
the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_fast.accelerated.encode import ANYRES, Visuals, geometry, tiling
from llava_fast.accelerated.transfer import read_integers
from llava_fast.errors import ImageError, PlanError
from llava_fast.inputs.plan.from_ids import placement_columns, rows_of_images, supervised_rows
from llava_fast.inputs.plan.visual_table import Pool, Reduce, Stage
from llava_fast.inputs.tiling.video import video_rows
from llava_fast.models.placement import Placement
from llava_fast.ops.token_pack import InversePlacement

PREFIX = "llava_plan_"
POOL = ("pool_index", "pool_weight", "pool_order", "pool_start")
SUPERVISED = ("supervised_row", "supervised_target")
COLUMNS = (
    "source",
    "row",
    "kept",
    "place",
    "video_place",
    "tile",
    "frame",
    *InversePlacement._fields,
    *POOL,
    *SUPERVISED,
)
NAMES = tuple(PREFIX + name for name in COLUMNS)
"""source, row, kept, place, video_place and the inverse placement are those of inputs.plan.from_ids.placement_columns.
tile [tiles]: index of each real tile in pixel_values, counting padding tiles; frame [frames]: the same in
pixel_values_videos. pool_*: the table of pooled rows (pool_weight is float32 reinterpreted as int32; see
inputs.plan.Pool), the last two only with labels. supervised_row, supervised_target [labelled rows]: the rows whose next
token has a label, and the labels. Columns that do not apply to a batch are empty."""


def make(
    config,
    ids: Tensor,
    labels: Tensor | None = None,
    pixels: Tensor | None = None,
    image_sizes: Tensor | None = None,
    frames: Tensor | None = None,
    batch_num_images: Tensor | None = None,
) -> dict[str, Tensor]:
    """The plan of a batch on the CPU: one tensor per name in NAMES, or {} if only the stock path supports its videos.

    config            the model's config.
    ids, labels       int64 [B, S].
    pixels            as padded by the processor: [images, most tiles, 3, H, W] for AnyRes, else [images, 3, H, W].
    image_sizes       int [images, 2] as (height, width), for AnyRes.
    frames            of videos, [videos, frames, 3, H, W].
    batch_num_images  int [prompts with images], LLaVA-OneVision's: the number of images of each.
    Raises ImageError if the numbers of image or video tokens and of their rows differ, PlanError for a label outside
    the vocabulary.
    """
    has_class_row = config.vision_config.model_type == "clip_vision_model"
    skipped = int(config.vision_feature_select_strategy == "default")
    if frames is not None and (_kind_of_pool(config) is None or (has_class_row and not skipped)):
        return {}
    shape = geometry(config, skipped, has_class_row)
    integers = read_integers(ids, image_sizes, labels, batch_num_images)
    images = rows_of_images(shape, integers.sizes, 0 if pixels is None else len(pixels), integers.counts)
    videos = [] if frames is None else [video_rows(shape, frames.shape[1])] * len(frames)
    most = pixels.shape[1] if pixels is not None and pixels.dim() == 5 else 1
    tiles = [rows.tiles for rows in images]
    if tiles and max(tiles) > most:
        raise ImageError(f"an image has {max(tiles)} tiles, but pixel_values hold {most} of each")
    tokens = config.image_token_id, getattr(config, "video_token_id", None)
    columns, pools = placement_columns(
        images, integers.ids, tokens[0], shape.tower_rows_per_tile, videos, tokens[1], labels is not None
    )
    if [(pool.stage, pool.reduce) for pool in pools] not in ([], [_kind_of_pool(config)]):
        raise PlanError(f"a plan cannot express the pooling of this {config.model_type}: use Collator(..., plan=False)")
    empty = {name: np.zeros((0, 1) if name in POOL[:2] else 0, np.int64) for name in POOL}
    columns = empty | {name.replace("pool0_", "pool_"): column for name, column in columns.items()}
    columns["frame"] = np.arange(sum(rows.tiles for rows in videos))
    real = [image * most + np.arange(number) for image, number in enumerate(tiles)]
    columns["tile"] = np.concatenate([np.zeros(0, np.int64), *real])
    none = np.zeros(0, np.int64)
    rows, targets = (none, none) if integers.labels is None else supervised_rows(integers.labels)
    vocabulary = config.text_config.vocab_size
    if len(targets) and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise PlanError(f"labels are {targets.min()}..{targets.max()}, but the vocabulary has {vocabulary} tokens")
    columns |= dict(zip(SUPERVISED, (rows, targets), strict=True))
    return {PREFIX + name: torch.from_numpy(columns[name].astype(np.int32)) for name in COLUMNS}


def _kind_of_pool(config) -> tuple[Stage, Reduce] | None:
    """(stage, reduce) of this model's pooled rows: those of shrunk images and pooled videos."""
    pooled = tiling(config)
    pool = pooled.get("video_pool")
    return pool and (pooled["video_pool_stage"], "max" if pool == "max" else "sum")


def without(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call without those of a plan."""
    return {name: value for name, value in given.items() if not name.startswith(PREFIX)}


def find(given: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The plan among a call's arguments, by the names in COLUMNS, or None. Raises PlanError if it does not match
    input_ids."""
    plan = {name: given[PREFIX + name] for name in COLUMNS if given.get(PREFIX + name) is not None}
    if not plan:
        return None
    ids = given.get("input_ids")
    if ids is None:
        raise PlanError(f"a plan ({PREFIX}*) was given without input_ids: leave it out of this call")
    if missing := [PREFIX + name for name in COLUMNS if name not in plan]:
        raise PlanError(f"the plan lacks {', '.join(missing)}: pass every {PREFIX}* that the collator makes")
    if len(plan["constant_segment"]) != 2 or len(plan["text_segment"]) != len(plan["text_token"]) + 1:
        raise PlanError(
            f"the plan ({PREFIX}*) was cut or repeated, as nn.DataParallel cuts every tensor of a batch: use "
            "DistributedDataParallel, or Collator(..., plan=False)"
        )
    for name in ("source", "row"):
        if plan[name].numel() != ids.numel():
            raise PlanError(
                f"the plan has {plan[name].numel()} rows, but input_ids {tuple(ids.shape)} have {ids.numel()}: "
                f"collate the batch again after changing it, or leave the {PREFIX}* out"
            )
    return plan


def visuals(model, given: Mapping[str, Any], plan: dict[str, Tensor]) -> Visuals:
    """The images and videos of a call and the placement of their rows. Raises PlanError if the plan does not match."""
    strategy = given.get("vision_feature_select_strategy")
    if strategy not in (None, model.config.vision_feature_select_strategy):
        raise PlanError(f"the plan is not for vision_feature_select_strategy={strategy!r}: leave the {PREFIX}* out")
    pixels, frames, ids = given.get("pixel_values"), given.get("pixel_values_videos"), given["input_ids"]
    for name, part, column in (("pixel_values", pixels, "tile"), ("pixel_values_videos", frames, "frame")):
        count = len(plan[column])
        there = 0 if part is None else part.shape[:-3].numel()
        fills_up = name == "pixel_values" and part is not None and part.dim() == 5 and model.config.model_type in ANYRES
        if count > there or (count != there and not fills_up):
            shape = "is not given" if part is None else f"has shape {tuple(part.shape)}"
            raise PlanError(f"the plan has {count} {column}s, but {name} {shape}: collate the batch again")
    device = next(part for part in (pixels, frames, ids) if part is not None).device
    plan = {name: column.to(device, non_blocking=True) for name, column in plan.items()}
    if ids.device.type == "cpu":
        _check_ids(ids.flatten(), plan, model.config)
    made = {}
    if pixels is not None:
        tiles = pixels.flatten(0, -4)
        made["pixel_values"] = tiles if len(tiles) == len(plan["tile"]) else tiles[plan["tile"].long()]
    if frames is not None:
        made["pixel_values_videos"] = frames.flatten(0, 1)
    videos = 0 if frames is None else len(frames)
    at = Placement.of(plan.get, _pools(model.config, plan))
    return Visuals(made, at, plan["place"], plan["video_place"], [], videos)


def _pools(config, plan: dict[str, Tensor]) -> list[Pool]:
    """The pooling of a plan, if any. Removes the two columns for gradients from the plan if they are empty."""
    if not len(plan["pool_index"]):
        return []
    if not len(plan["pool_start"]):
        del plan["pool_order"], plan["pool_start"]
    kind = _kind_of_pool(config)
    assert kind is not None  # of a plan with pooled rows
    return [Pool(*kind, *POOL)]


def supervision(plan: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, targets) of the loss, on the device of labels [B, S]. Raises PlanError for labels that differ from those
    of the plan, if comparing them needs no transfer from a device."""
    rows, targets = (plan[name].to(labels.device, non_blocking=True) for name in SUPERVISED)
    if labels.device.type == "cpu":
        expected = supervised_rows(labels.numpy())
        if not all(np.array_equal(a, b) for a, b in zip((rows.numpy(), targets.numpy()), expected, strict=True)):
            raise PlanError(f"labels were changed after the plan was made: collate again, or leave the {PREFIX}* out")
    return rows, targets


def _check_ids(ids: Tensor, plan: dict[str, Tensor], config) -> None:
    text = plan["text_row"].long()
    tokens = {"place": config.image_token_id, "video_place": getattr(config, "video_token_id", None)}
    there = [(plan[name].long(), token) for name, token in tokens.items() if len(plan[name])]
    same_places = all(torch.equal(place, (ids == token).nonzero()[:, 0]) for place, token in there)
    if not same_places or not torch.equal(plan["row"][text].long(), ids[text]):
        raise PlanError(f"input_ids were changed after the plan was made: collate again, or leave the {PREFIX}* out")
