"""The plan of a batch as flat int32 tensors named `llava_plan_*`, made by the collator and taken by an accelerated
model's forward, which then asks no tensor for its values: nothing waits for the device.

Only shapes are checked on a device; on a CPU, where looking costs nothing, also that the plan is of this batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_fast.errors import ImageError, LlavaFastError
from llava_fast.integrations import placement
from llava_fast.integrations.hf_inputs import ANYRES, Visuals, geometry
from llava_fast.ops.token_pack import RowUses

PREFIX = "llava_plan_"
COLUMNS = ("source", "row", "kept", "place", "tile", *RowUses._fields, "supervised_row", "supervised_target")
NAMES = tuple(PREFIX + name for name in COLUMNS)
"""source, row, kept, place and the uses are those of placement.Placement; tile [tiles] numbers each real tile among the
tiles of pixel_values, those that fill up counted; supervised_row, supervised_target [rows with a label] are the rows
whose next token carries a label, and it (both empty without labels)."""
FAMILIES = ("llava", "llava_next", "llava_next_video")
"""The model types whose batches (images and text) a plan is made for."""


class PlanError(LlavaFastError):
    """A plan that does not belong to the batch it came with."""


def make(
    config, ids: Tensor, labels: Tensor | None = None, pixels: Tensor | None = None, image_sizes: Tensor | None = None
) -> dict[str, Tensor]:
    """The plan of a batch on the CPU, one tensor for each of NAMES.

    config       the model's.
    ids, labels  int64 [B, S].
    pixels       as the processor pads them: [images, most, 3, H, W] for AnyRes, else [images, 3, H, W].
    image_sizes  int [images, 2] as (height, width), for AnyRes.
    Raises ImageError where image tokens and image rows differ in number, PlanError for a label outside the vocabulary.
    """
    has_class_row = config.vision_config.model_type == "clip_vision_model"
    skipped = int(config.vision_feature_select_strategy == "default")
    shape = geometry(config, skipped, has_class_row)
    integers = placement.read_integers(ids, image_sizes, labels)
    images = placement.rows_of_images(shape, integers.sizes, 0 if pixels is None else len(pixels))
    most = pixels.shape[1] if pixels is not None and pixels.dim() == 5 else 1
    tiles = [rows.tiles for rows in images]
    if tiles and max(tiles) > most:
        raise ImageError(f"an image has {max(tiles)} tiles, but pixel_values hold {most} of each")
    tower_rows = (shape.rows_per_tile + skipped, skipped)
    columns, _ = placement.placement_columns(images, integers.ids, config.image_token_id, tower_rows)
    real = [image * most + np.arange(number) for image, number in enumerate(tiles)]
    columns["tile"] = np.concatenate([np.zeros(0, np.int64), *real])
    none = np.zeros(0, np.int64)
    rows, targets = (none, none) if integers.labels is None else placement.supervised_rows(integers.labels)
    vocabulary = config.text_config.vocab_size
    if len(targets) and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise PlanError(f"labels lie in {targets.min()}..{targets.max()}, and the vocabulary has {vocabulary} tokens")
    columns |= {"supervised_row": rows, "supervised_target": targets}
    return {PREFIX + name: torch.from_numpy(columns[name].astype(np.int32)) for name in COLUMNS}


def without(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call without a plan's."""
    return {name: value for name, value in given.items() if not name.startswith(PREFIX)}


def find(given: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The plan among a call's arguments, by the names in COLUMNS, or None if there is none. Raises PlanError if it does
    not fit input_ids."""
    plan = {name: given[PREFIX + name] for name in COLUMNS if given.get(PREFIX + name) is not None}
    if not plan:
        return None
    ids = given.get("input_ids")
    if ids is None:
        raise PlanError(f"a plan ({PREFIX}*) came without input_ids: leave its names out of this call")
    if missing := [PREFIX + name for name in COLUMNS if name not in plan]:
        raise PlanError(
            f"of a plan, {', '.join(missing)} did not come: pass on every {PREFIX}* that the collator makes"
        )
    if len(plan["constant_segment"]) != 2 or len(plan["text_segment"]) != len(plan["text_token"]) + 1:
        raise PlanError(
            f"the plan ({PREFIX}*) was cut or repeated, as nn.DataParallel cuts every tensor of a batch: use "
            "DistributedDataParallel, or Collator(..., plan=False)"
        )
    for name in ("source", "row"):
        if plan[name].numel() != ids.numel():
            raise PlanError(
                f"the plan is of {plan[name].numel()} rows, but input_ids {tuple(ids.shape)} are {ids.numel()}: "
                f"collate the batch again after changing it, or leave the {PREFIX}* out"
            )
    return plan


def visuals(model, given: Mapping[str, Any], plan: dict[str, Tensor], read_table: bool) -> Visuals:
    """The images of a call and the placement of their rows. Raises PlanError where the plan does not fit them."""
    strategy = given.get("vision_feature_select_strategy")
    if strategy not in (None, model.config.vision_feature_select_strategy):
        raise PlanError(f"the plan is not for vision_feature_select_strategy={strategy!r}: leave the {PREFIX}* out")
    pixels, ids = given["pixel_values"], given["input_ids"]
    anyres = model.config.model_type in ANYRES
    tiles = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
    count = len(plan["tile"])
    if count > len(tiles) or (pixels.dim() == 4 or not anyres) and count != len(tiles):
        raise PlanError(f"the plan is of {count} tiles, but pixel_values are {tuple(pixels.shape)}")
    plan = {name: column.to(pixels.device, non_blocking=True) for name, column in plan.items()}
    if ids.device.type == "cpu":
        _check_ids(ids.flatten(), plan, model.config.image_token_id)
    if count != len(tiles):
        tiles = tiles[plan["tile"].long()]
    return Visuals({"pixel_values": tiles}, placement.placement(plan, read_table), [])


def supervision(plan: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, targets) of the loss, on the device of labels [B, S]. Raises PlanError if a look costs nothing and labels
    are others than those the plan was made of."""
    rows, targets = (plan[name].to(labels.device, non_blocking=True) for name in COLUMNS[-2:])
    if labels.device.type == "cpu":
        expected = placement.supervised_rows(labels.numpy())
        if not all(np.array_equal(a, b) for a, b in zip((rows.numpy(), targets.numpy()), expected, strict=True)):
            raise PlanError(f"labels were changed after the plan was made: collate again, or leave the {PREFIX}* out")
    return rows, targets


def _check_ids(ids: Tensor, plan: dict[str, Tensor], image_token: int) -> None:
    text = plan["text_row"].long()
    same_places = torch.equal(plan["place"].long(), (ids == image_token).nonzero()[:, 0])
    if not same_places or not torch.equal(plan["row"][text].long(), ids[text]):
        raise PlanError(f"input_ids were changed after the plan was made: collate again, or leave the {PREFIX}* out")
