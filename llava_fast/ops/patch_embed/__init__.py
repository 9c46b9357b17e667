"""patch_embed: uint8 tiles to ViT rows, with pixel normalisation folded into the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import backend
from llava_fast.ops.patch_embed import reference

backend.register("patch_embed", "reference", "any device")


def patch_embed(
    tiles: Tensor,
    weight: Tensor,
    position: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    bias: Tensor | None = None,
    class_row: Tensor | None = None,
) -> Tensor:
    """Patch embeddings with class row and position embedding.

    tiles      uint8 [tiles, 3, H, W], pixels as they are; or floating [tiles, 3, H, W], already normalised.
    weight     [width, 3, P, P], the convolution's weight. bias [width] or None.
    position   [rows, width] with rows = (H//P)*(W//P), plus one first where `class_row` [width] is given.
    mean, std  [3], of pixels in 0..1.
    Returns [tiles, rows, width] in the weight's dtype. FLOPs 2*tiles*patches*3*P*P*width; minimum bytes: the
    tiles, the weight and the rows, once each.

    Raises ValueError for shapes that do not fit. Source: Dosovitskiy et al. 2021 (ViT), the fold is ours.
    """
    if tiles.dim() != 4 or tiles.shape[1] != 3:
        raise ValueError(f"tiles must be [tiles, 3, H, W], got {tuple(tiles.shape)}")
    if tiles.dtype != torch.uint8 and not tiles.is_floating_point():
        raise ValueError(f"tiles must be uint8 pixels or normalised floats, got {tiles.dtype}")
    patch = weight.shape[-1]
    rows = (tiles.shape[2] // patch) * (tiles.shape[3] // patch) + (class_row is not None)
    if position.shape != (rows, weight.shape[0]):
        raise ValueError(
            f"position embedding is {tuple(position.shape)}, but tiles of {tuple(tiles.shape[2:])} pixels in patches "
            f"of {patch} need {(rows, weight.shape[0])}"
        )
    backend.choose("patch_embed")
    return reference.patch_embed(tiles, weight, bias, position, class_row, mean, std)
