"""uint8 tiles to patch embeddings in plain PyTorch: the specification of `llava_fast.ops.patch_embed`.

A ViT applies a strided convolution, that is a GEMM over flattened patches, to ((pixel / 255) - mean) / std. This affine
normalisation is folded into the weight: with x' = pixel - 128 (exact in bfloat16), weight' = weight / (255 std) and
bias' = bias + sum(weight (128/255 - mean) / std). Products and bias are summed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

CENTRE = 128.0


def fold_normalisation(weight: Tensor, bias: Tensor | None, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(weight', bias') for centred pixels. weight [width, 3, P, P] -> [width, 3*P*P] in its dtype; bias' float32.

    bias' is computed from the rounded weight', so that an image of the mean colour maps to the bias in bfloat16 too.
    """
    wide = _wide(weight.dtype)
    folded = (weight.to(wide) / (255.0 * std.to(wide)[:, None, None])).to(weight.dtype)
    shift = CENTRE - 255.0 * mean.to(wide)[:, None, None]
    offset = (folded.to(wide) * shift).sum(dim=(1, 2, 3))
    return folded.flatten(1), offset if bias is None else offset + bias.to(wide)


def fold_gradient(folded_grad: Tensor, offset_grad: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The weight's gradient from those of weight' [width, 3, P, P] and bias' [width]; rounding counts as the identity.

    weight' = weight / (255 std) and bias' = bias + sum(weight' (128 - 255 mean)), so
    d weight = (d weight' + d bias' (128 - 255 mean)) / (255 std).
    """
    wide = folded_grad.dtype
    shift = CENTRE - 255.0 * mean.to(wide)[:, None, None]
    return (folded_grad + offset_grad[:, None, None, None] * shift) / (255.0 * std.to(wide)[:, None, None])


def patch_rows(tiles: Tensor, patch: int) -> Tensor:
    """Tiles to patch rows [tiles, patches, 3*P*P] in (channel, y, x) order.

    Planar tiles [tiles, 3, H, W] have (H//P)*(W//P) patches. Of patch rows [tiles, patches, row bytes] only the padding
    is removed.
    """
    if tiles.dim() == 3:
        return tiles[..., : 3 * patch * patch]
    grid_h, grid_w = tiles.shape[2] // patch, tiles.shape[3] // patch
    whole = tiles[:, :, : grid_h * patch, : grid_w * patch]
    return rearrange(whole, "t c (gh ph) (gw pw) -> t (gh gw) (c ph pw)", ph=patch, pw=patch)


def patch_embed(
    tiles: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    class_row: Tensor | None,
    mean: Tensor,
    std: Tensor,
    count: Tensor | None,
) -> Tensor:
    """The ViT's input rows [tiles, (1 +) patches, width]. See `llava_fast.ops.patch_embed` for the arguments."""
    patch = weight.shape[-1]
    if tiles.dtype == torch.uint8:
        folded, offset = fold_normalisation(weight, bias, mean, std)
        rows = patch_rows(tiles, patch).to(offset.dtype) - CENTRE
        embedded = F.linear(rows, folded.to(offset.dtype), offset).to(weight.dtype)
    else:
        embedded = F.linear(patch_rows(tiles, patch), weight.flatten(1), bias)
    if class_row is not None:
        embedded = torch.cat([class_row.expand(len(embedded), 1, -1), embedded], dim=1)
    rows = (embedded + position).to(weight.dtype)
    return rows if count is None else first_tiles(rows, count)


def first_tiles(rows: Tensor, count: Tensor) -> Tensor:
    """rows [tiles, ..] with zeros for tiles from index count[0] on."""
    is_first = torch.arange(len(rows), device=rows.device) < count
    return torch.where(is_first.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def patch_embed_backward(
    grad: Tensor,
    tiles: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    std: Tensor,
    shape: tuple[int, ...],
    patch: int,
    class_rows: int,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of tiles, weight, position, bias and class_row, summed in float32; None where not needed.

    grad [tiles, rows, width], where the first `class_rows` (0 or 1) rows of a tile are class rows; shape: the tiles'.
    tiles is read only for the weight's gradient, weight only for the gradient of floating tiles.
    """
    wide = grad.to(_wide(grad.dtype))
    patches = wide[:, class_rows:]
    found: list[Tensor | None] = [None] * 5
    if needed[0]:
        assert weight is not None
        found[0] = _unpatch(patches @ weight.to(wide.dtype).flatten(1), shape, patch)
    if needed[1]:
        assert tiles is not None
        rows = patch_rows(tiles, patch).to(wide.dtype)
        is_pixels = tiles.dtype == torch.uint8
        weight_grad = torch.einsum("tnw,tnk->wk", patches, rows - CENTRE if is_pixels else rows)
        weight_grad = weight_grad.unflatten(1, (3, patch, patch))
        found[1] = fold_gradient(weight_grad, patches.sum(dim=(0, 1)), mean, std) if is_pixels else weight_grad
    if needed[2]:
        found[2] = wide.sum(dim=0)
    if needed[3]:
        found[3] = patches.sum(dim=(0, 1))
    if needed[4]:
        found[4] = wide[:, 0].sum(dim=0)
    return tuple(None if one is None else one.to(grad.dtype) for one in found)


def _unpatch(rows: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """The inverse of patch_rows; pixels after the last whole patch are 0."""
    height, width = shape[2] // patch, shape[3] // patch
    whole = rearrange(rows, "t (gh gw) (c ph pw) -> t c (gh ph) (gw pw)", gh=height, ph=patch, pw=patch)
    return F.pad(whole, (0, shape[3] - width * patch, 0, shape[2] - height * patch))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
