"""The output classes of transformers' LLaVA models, and the image and video features in them."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from torch import Tensor

from llava_fast.accelerated import encode, versions
from llava_fast.accelerated.encode import Unfit
from llava_fast.accelerated.self_check import NAMES
from llava_fast.accelerated.stock import StockModel

KINDS = {name + "ForConditionalGeneration": name + "CausalLMOutputWithPast" for name in NAMES.values()}
"""Class name of the whole model -> class name of its outputs."""


def field_names(kind: type) -> set[str]:
    """The field names of an output class."""
    return {field.name for field in dataclasses.fields(kind)}


def output_class(model: StockModel) -> type:
    """The class that the stock forward returns, from the module of the model's class (which FSDP may have subclassed).
    Raises Unfit if there is none.
    """
    for kind in type(model).__mro__:
        found = getattr(sys.modules[kind.__module__], KINDS.get(kind.__name__, ""), None)
        if found is not None:
            return found
    raise Unfit(f"the output class of {type(model).__name__} is not known")


def show_encoder(inner: StockModel) -> bool:
    """Whether the outputs of an inner model include those of its tower, as since transformers 5.24. Raises Unfit for
    unknown outputs.
    """
    for kind in type(inner).__mro__:
        found = getattr(sys.modules[kind.__module__], f"{kind.__name__}OutputWithPast", None)
        if found is not None and field_names(found) & {"image_outputs", "image_hidden_states"}:
            return "image_outputs" in field_names(found)
    raise Unfit(f"the outputs of {type(inner).__name__} are not known")


def encoder_outputs(rows: list[Tensor] | Tensor) -> Any:
    """The result of get_image_features (a list) or get_video_features (a tensor), without the tower's hidden states."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=rows)  # type: ignore[arg-type]  # a list, against its annotation


def with_rows(model: StockModel, outputs: Any, made: encode.Embedded) -> Any:
    """Add the features of images and videos to the outputs of an inner model's stock forward.

    Since transformers 5.24 they are the encoder's outputs: its last hidden state, that of the selected layer, and the
    rows of each image (all rows in one tensor for AnyRes images with a shipped plan, whose counts the host does not
    know). Before, they were only the rows.
    """
    visuals, rows = made.visuals, made.embeds.flatten(0, 1)
    tiles = visuals.tiles
    found = {"pixel_values": visuals.place, "pixel_values_videos": visuals.video_place}
    found = {name: rows[place.long()] for name, place in found.items() if name in tiles}
    selected, last = made.features
    if last is None:
        if "pixel_values" in found:
            outputs["image_hidden_states"] = found["pixel_values"]
        if "pixel_values_videos" in found:
            videos = found["pixel_values_videos"]
            outputs["video_hidden_states"] = videos.flatten() if _flattens_videos(model) else videos
        return outputs
    counts = [len(part) for part in tiles.values()]
    for name, state, end in zip(tiles, selected.split(counts), last.split(counts), strict=True):
        part = found[name].to(made.dtype)
        if name == "pixel_values":
            anyres = model.config.model_type in encode.ANYRES
            each = visuals.lengths or (len(part) if anyres else len(part) // len(tiles[name]))
            outputs["image_outputs"] = _encoder(model, made.selection.layers, state, end, list(part.split(each)))
        else:
            outputs["video_outputs"] = _encoder(
                model, made.selection.layers, state, end, part.view(visuals.videos, -1, part.shape[-1])
            )
    return outputs


def _encoder(model: StockModel, layer: int, selected: Tensor, last: Tensor, rows: list[Tensor] | Tensor) -> Any:
    """A tower's outputs with the rows as pooler_output."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    states: list = [None] * (len(model.vision_tower.encoder.layers) + 1)
    states[layer] = selected
    pooled = rows if getattr(model.vision_tower, "use_head", True) else None
    made = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=tuple(states))  # type: ignore[arg-type]  # as above
    made["pooler_output"] = rows
    return made


def _flattens_videos(model: StockModel) -> bool:
    """Whether video_hidden_states has one dimension, as LLaVA-NeXT-Video's has since transformers 5.20."""
    return model.config.model_type == "llava_next_video" and versions.current() >= (5, 20)
