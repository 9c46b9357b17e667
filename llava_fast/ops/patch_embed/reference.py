"""uint8 tiles to patch embeddings with the normalisation folded into the weight: the specification.

A ViT sees ((pixel / 255) - mean) / std through a strided convolution, which is a GEMM over flattened patches. The
affine normalisation is folded: with x' = pixel - 128 (exact in bfloat16), weight' = weight / (255 std) and
bias' = bias + sum(weight (128/255 - mean) / std). Products and bias are summed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CENTRE = 128.0


def fold_normalisation(weight: Tensor, bias: Tensor | None, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(weight', bias') for centred pixels. weight [width, 3, P, P] -> [width, 3*P*P] in its dtype; bias' float32.

    The bias is taken from the rounded weight', so that a uniform image still maps where it should in bfloat16.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    std_C11, mean_C11 = std.to(wide)[:, None, None], mean.to(wide)[:, None, None]
    folded = (weight.to(wide) / (255.0 * std_C11)).to(weight.dtype)
    shift = CENTRE - 255.0 * mean_C11
    offset = (folded.to(wide) * shift).sum(dim=(1, 2, 3))
    return folded.flatten(1), offset if bias is None else offset + bias.to(wide)


def patch_rows(tiles: Tensor, patch: int) -> Tensor:
    """Planar tiles [tiles, 3, H, W] to patch rows [tiles, (H//P)*(W//P), 3*P*P] in (channel, y, x) order."""
    count, channels, height, width = tiles.shape
    grid_h, grid_w = height // patch, width // patch
    tiles = tiles[:, :, : grid_h * patch, : grid_w * patch]
    blocks = tiles.reshape(count, channels, grid_h, patch, grid_w, patch).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(count, grid_h * grid_w, channels * patch * patch)


def patch_embed(
    tiles: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    class_row: Tensor | None,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Rows of the ViT: [tiles, (1 +) patches, width]. See `llava_fast.ops.patch_embed` for the arguments."""
    patch = weight.shape[-1]
    if tiles.dtype == torch.uint8:
        folded, offset = fold_normalisation(weight, bias, mean, std)
        rows = patch_rows(tiles, patch).to(offset.dtype) - CENTRE
        embedded = F.linear(rows, folded.to(offset.dtype), offset).to(weight.dtype)
    else:
        embedded = F.linear(patch_rows(tiles, patch), weight.flatten(1), bias)
    if class_row is not None:
        embedded = torch.cat([class_row.expand(len(embedded), 1, -1), embedded], dim=1)
    return embedded + position
