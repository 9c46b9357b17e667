"""From a Hugging Face LLaVA's pixels to the decoder's inputs: the tower up to the selected layer, only kept rows
projected, every row put in its place by integers.

`unfit` says at each call why a model or a call must take the stock path; the other functions assume it said nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llava_fast.errors import ImageError
from llava_fast.inputs.anyres import VisualGeometry
from llava_fast.integrations.placement import Integers, Placement, place_rows, rows_of_images
from llava_fast.models.modules import is_plain
from llava_fast.ops import assemble_inputs, backend, token_pack
from llava_fast.ops.activations import ACTIVATIONS

ANYRES = ("llava_next", "llava_next_video")
TOWERS = ("transformers.models.clip.modeling_clip", "transformers.models.siglip.modeling_siglip")


class Selection(NamedTuple):
    """Which of the tower's hidden states are used: the layers to run, and how many rows of each tile to skip."""

    layers: int
    skipped: int


def untouched(module: nn.Module) -> bool:
    """No hooks and no forward of its own: calling its parts is calling it."""
    return is_plain(module, type(module))


def unfit(model: nn.Module, given: dict) -> str | None:
    """Why this call of an inner LLaVA model (its forward or get_image_features) must take the stock path, or None."""
    asked = [name for name in ("output_hidden_states", "output_attentions") if _asked(model, given, name)]
    if asked:
        return f"{' and '.join(asked)} asked for"
    return_dict = given.get("return_dict")
    if not (model.config.return_dict if return_dict is None else return_dict):
        return "a tuple is asked for (return_dict=False)"
    layer = _option(model, given, "vision_feature_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        return f"a list of feature layers is asked for ({layer!r})"
    for name in ("inputs_embeds", "mm_encoder_outputs", "pixel_values_videos"):
        if given.get(name) is not None:
            return f"{name} is given"
    anyres = model.config.model_type in ANYRES
    if not anyres and given.get("image_sizes") is not None:
        return "image_sizes is given"
    if anyres and given.get("image_sizes") is None:
        return "image_sizes is not given"
    pixels, ids = given["pixel_values"], given.get("input_ids")
    if pixels.dim() not in ((4, 5) if anyres else (4,)) or not len(pixels):
        return f"pixel_values of shape {tuple(pixels.shape)}"
    tower = model.vision_tower
    if not any(kind.__module__ in TOWERS for kind in type(tower).__mro__):
        return f"the vision tower is a {type(tower).__name__}, and only CLIP's and SigLIP's are known"
    parts = [pixels, *tower.embeddings.parameters(), *model.get_input_embeddings().parameters()]
    devices = {str(part.device) for part in parts} | ({str(ids.device)} if ids is not None else set())
    if len(devices) > 1:
        return f"the model and its inputs lie on several devices ({', '.join(sorted(devices))})"
    if not all(untouched(part) for part in (tower, tower.encoder)):
        return "the vision tower is hooked or wrapped"
    depth = len(tower.encoder.layers)
    if not -depth - 1 <= layer <= depth:
        return f"vision_feature_layer {layer} of a tower with {depth} layers"
    if layer in (-1, depth) and getattr(tower.config, "tie_last_hidden_states", None):
        return "the tower's last hidden state is tied to its last LayerNorm"
    return None


def _asked(model: nn.Module, given: dict, name: str) -> bool:
    """Whether an output is asked for by argument, or, without one, by the model's or its decoder's config."""
    value = given.get(name)
    if value is None:
        config = model.config
        value = getattr(config, name, False) or getattr(getattr(config, "text_config", None), name, False)
    return value is not False


def _option(model: nn.Module, given: dict, name: str):
    value = given.get(name)
    return getattr(model.config, name) if value is None else value


def select(model: nn.Module, given: dict) -> Selection:
    layer = _option(model, given, "vision_feature_layer")
    depth = len(model.vision_tower.encoder.layers)
    skipped = _option(model, given, "vision_feature_select_strategy") == "default"
    return Selection(layer if layer >= 0 else depth + 1 + layer, int(skipped))


def geometry(config, skipped: int, has_class_row: bool) -> VisualGeometry:
    """How the checkpoint reads an image, `skipped` rows of each tile left out. Raises ImageError for a layout that
    stock code does not have either."""
    vision = config.vision_config
    if skipped and not has_class_row:
        raise ImageError("feature selection 'default' cuts a patch off a tower without a class row")
    anyres = config.model_type in ANYRES
    return VisualGeometry(
        tile_size=vision.image_size,
        patch_size=vision.patch_size,
        aspect="anyres" if anyres else "squash",
        pinpoints=tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints) if anyres else (),
        merge="spatial_unpad" if anyres else "flat",
        class_rows=int(has_class_row and not skipped),
    )


class Images(NamedTuple):
    """A call's images: their pixels [tiles, 3, H, W], where their rows go, and how many rows each has."""

    pixels: Tensor
    placement: Placement
    lengths: list[int]


def plan_images(
    model: nn.Module, pixels: Tensor, integers: Integers, selection: Selection, read_table: bool = True
) -> Images:
    """Images and the placement of their rows. Raises ImageError where pixels, sizes and image tokens disagree."""
    has_class_row = hasattr(model.vision_tower.embeddings, "class_embedding")
    shape = geometry(model.config, selection.skipped, has_class_row)
    anyres = shape.aspect == "anyres"
    count = len(pixels) if integers.sizes is None else len(integers.sizes)
    rows = rows_of_images(shape, integers.sizes if anyres else None, count)
    if pixels.dim() == 5:
        if len(pixels) != count or max(rows.tiles) > pixels.shape[1]:
            raise ImageError(f"pixel_values {tuple(pixels.shape)} do not hold {count} images of {rows.tiles} tiles")
        pixels = torch.cat([tiles[:number] for tiles, number in zip(pixels, rows.tiles, strict=True)])
    if len(pixels) != sum(rows.tiles):
        raise ImageError(f"{len(pixels)} tiles are given, but the images have {sum(rows.tiles)}")
    tower_rows = (shape.rows_per_tile + selection.skipped, selection.skipped)
    token = model.config.image_token_id
    placement = place_rows(rows, integers.ids, token, tower_rows, read_table, pixels.device)
    return Images(pixels, placement, rows.lengths)


def tower_features(tower: nn.Module, pixels: Tensor, layers: int) -> Tensor:
    """Hidden states [tiles, rows, width] after so many layers; later layers do not run."""
    hidden = tower.embeddings(pixels, interpolate_pos_encoding=False)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:layers]:
        hidden = layer(hidden, None)
    return hidden


def projected_rows(model: nn.Module, features: Tensor, kept: Tensor, skipped: int) -> Tensor:
    """The kept rows, projected. A projector with hooks sees all tiles, as it does in the stock model."""
    projector = model.multi_modal_projector
    if all(untouched(part) for part in projector.modules()):
        return projector(features.flatten(0, 1)[kept.long()])
    rows = features.shape[1]
    projected = projector(features[:, skipped:])
    kept = kept.long()
    return projected.flatten(0, 1)[kept - (kept // rows + 1) * skipped]


def image_features(model: nn.Module, images: Images, selection: Selection) -> list[Tensor]:
    """What stock get_image_features gives as pooler_output: each image's rows in order, [rows, width]."""
    features = tower_features(model.vision_tower, images.pixels, selection.layers)
    at = images.placement
    visual = projected_rows(model, features, at.kept, selection.skipped)
    constant = _newline(model, visual)
    packed = token_pack(at.source, at.row, visual[:0], visual, constant, at.uses)
    return list(packed.split(images.lengths))


def inputs_embeds(model: nn.Module, ids: Tensor, images: Images, selection: Selection, read_table: bool) -> Tensor:
    """[B, S, width]: text rows from the embedding, image rows from tower and projector.

    One op where a backend fuses them and every module is plain; else step by step.
    """
    features = tower_features(model.vision_tower, images.pixels, selection.layers)
    embed, at = model.get_input_embeddings(), images.placement
    table = embed.weight if read_table else embed(ids).flatten(0, 1)
    weights = projector_weights(model)
    if weights is not None and _fuses(features, weights, table):
        name = model.config.projector_hidden_act
        constant = _newline(model, table)
        flat = assemble_inputs(
            features.flatten(0, 1), at.kept, *weights, at.source, at.row, table, constant, at.uses, name
        )
    else:
        visual = projected_rows(model, features, at.kept, selection.skipped).to(table.dtype)
        flat = token_pack(at.source, at.row, table, visual, _newline(model, table), at.uses)
    return flat.view(*ids.shape, -1)


def reads_table(embed: nn.Module) -> bool:
    """Whether text rows may be read from the embedding's weight: an exact nn.Embedding without special gradients."""
    return (
        is_plain(embed, nn.Embedding)
        and type(embed.weight) is nn.Parameter
        and embed.max_norm is None
        and not (embed.sparse or embed.scale_grad_by_freq)
        and (embed.padding_idx is None or not embed.weight.requires_grad)
    )


def projector_weights(model: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """(weights, biases) of a projector that is just as transformers builds it, else None."""
    projector = model.multi_modal_projector
    linears = [projector.linear_1, projector.linear_2] if hasattr(projector, "linear_2") else []
    if not linears or not untouched(projector) or not untouched(projector.act):
        return None
    if not all(is_plain(linear, nn.Linear) for linear in linears):
        return None
    if model.config.projector_hidden_act not in ACTIVATIONS:
        return None
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    plain = len(biases) in (0, len(linears)) and all(type(part) is nn.Parameter for part in (*weights, *biases))
    return (weights, biases) if plain else None


def _fuses(features: Tensor, weights: tuple[list[Tensor], list[Tensor]], table: Tensor) -> bool:
    device = table.device.type
    same = {features.dtype, table.dtype, *(part.dtype for part in (*weights[0], *weights[1]))}
    return len(same) == 1 and not torch.is_autocast_enabled(device) and backend.fuses("assemble_inputs", device)


def _newline(model: nn.Module, like: Tensor) -> Tensor:
    """The table of constant rows: the newline row, in the dtype of `like`. Without newlines one row that none takes."""
    newline = getattr(model, "image_newline", None)
    return like.new_zeros(1, like.shape[-1]) if newline is None else newline[None].to(like.dtype)
