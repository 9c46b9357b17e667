"""patch_embed: uint8 tiles to a ViT's input rows, with the pixel normalisation folded into the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.patch_embed import reference

backend.register("patch_embed", "reference", "any device")
backend.register("patch_embed", "triton", "CUDA, uint8 tiles")


def patch_embed(
    tiles: Tensor,
    weight: Tensor,
    position: Tensor,
    *,
    mean: Tensor,
    std: Tensor,
    bias: Tensor | None = None,
    class_row: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Patch embeddings with class row and position embedding.

    tiles      uint8 [tiles, 3, H, W] raw pixels; or uint8 [tiles, patches, row bytes], the same pixels as one row per
               patch in (channel, y, x) order, padded to a multiple of 16; or floating [tiles, 3, H, W], already
               normalised.
    weight     [width, 3, P, P], the convolution's weight. bias [width] or None.
    position   [rows, width] with rows = (H//P)*(W//P), plus one for the class row, first, if `class_row` is given.
    class_row  [width] or None.
    mean, std  [3], of pixels scaled to 0..1; no gradient.
    count      int32 [1] on the tiles' device: tiles from index count[0] on are padding of a CUDA graph's bucket. Their
               output rows are zeros and they do not contribute to gradients. None: no padding.
    Returns [tiles, rows, width] in the weight's dtype. FLOPs: 2*tiles*patches*3*P*P*width; minimum bytes: the tiles,
    the weight and the rows, once each. The weight's gradient takes as many FLOPs again, and at least the bytes of the
    rows' gradient and the tiles. Gradients are summed in float32 in a fixed order.

    Raises ValueError for mismatched shapes. Source: Dosovitskiy et al. 2021 (ViT); folding the normalisation is ours.
    """
    if weight.dim() != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be [width, 3, P, P], got {tuple(weight.shape)}")
    width, patch = weight.shape[0], weight.shape[-1]
    if tiles.dtype == torch.uint8 and tiles.dim() == 3:
        if tiles.shape[2] % 16 or tiles.shape[2] < 3 * patch * patch:
            raise ValueError(
                f"patch rows must hold the {3 * patch * patch} bytes of a patch, padded to a multiple of 16, got "
                f"{tuple(tiles.shape)}"
            )
        patches, what = tiles.shape[1], f"patch rows of {tuple(tiles.shape)}"
    else:
        if tiles.dim() != 4 or tiles.shape[1] != 3:
            raise ValueError(f"tiles must be [tiles, 3, H, W], got {tuple(tiles.shape)}")
        if tiles.dtype != torch.uint8 and not tiles.is_floating_point():
            raise ValueError(f"tiles must be uint8 pixels or normalised floats, got {tiles.dtype}")
        patches = (tiles.shape[2] // patch) * (tiles.shape[3] // patch)
        what = f"tiles of {tuple(tiles.shape[2:])} pixels in patches of {patch}"
    rows = patches + (class_row is not None)
    if position.shape != (rows, width):
        raise ValueError(f"position embedding is {tuple(position.shape)}, but {what} need {(rows, width)}")
    for name, vector, size in (
        ("bias", bias, width),
        ("class_row", class_row, width),
        ("mean", mean, 3),
        ("std", std, 3),
        ("count", count, 1),
    ):
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} must be [{size}], got {tuple(vector.shape)}")
    return _patch_embed(tiles, weight, position, mean, std, bias, class_row, count)


def _run(
    tiles: Tensor,
    weight: Tensor,
    position: Tensor,
    mean: Tensor,
    std: Tensor,
    bias: Tensor | None,
    class_row: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    unfit = triton_support.unfit(tiles, weight, position, mean, std, bias, class_row) or _unfit(tiles, weight)
    unfit = unfit or _unequal(weight, position, class_row)
    if backend.choose("patch_embed", weight.device.type, {"triton": unfit}) == "triton":
        from llava_fast.ops.patch_embed import triton_kernels

        return triton_kernels.patch_embed(tiles, weight, position, mean, std, bias, class_row, count)
    return reference.patch_embed(tiles, weight, bias, position, class_row, mean, std, count)


def _unfit(tiles: Tensor | None, grad_or_weight: Tensor) -> str | None:
    if tiles is not None and tiles.dtype != torch.uint8:
        return f"it takes uint8 pixels, and the tiles are {tiles.dtype}"
    return None if grad_or_weight.is_floating_point() else f"the weight is {grad_or_weight.dtype}"


def _unequal(weight: Tensor, position: Tensor, class_row: Tensor | None) -> str | None:
    dtypes = {tensor.dtype for tensor in (weight, position, class_row) if tensor is not None}
    return f"the weights' dtypes differ: {', '.join(map(str, dtypes))}" if len(dtypes) > 1 else None


def _run_backward(
    grad: Tensor,
    tiles: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    std: Tensor,
    shape: list[int],
    patch: int,
    class_rows: int,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    unfit = triton_support.unfit(grad, tiles) or _unfit(tiles, grad)
    unfit = unfit or ("it does not compute the gradient of the tiles" if needed[0] else None)
    if backend.choose("patch_embed", grad.device.type, {"triton": unfit}) == "triton":
        from llava_fast.ops.patch_embed import triton_kernels

        found = triton_kernels.patch_embed_backward(grad, tiles, mean, std, tuple(shape), patch, class_rows, needed)
    else:
        found = reference.patch_embed_backward(
            grad, tiles, weight, mean, std, tuple(shape), patch, class_rows, tuple(needed)
        )
    return tuple(grad.new_empty(0) if one is None else one for one in found)


def _fake_backward(grad, tiles, weight, mean, std, shape, patch, class_rows, needed):
    width = grad.shape[2]
    sizes = (shape, (width, 3, patch, patch), grad.shape[1:], (width,), (width,))
    return tuple(grad.new_empty(size if want else (0,)) for size, want in zip(sizes, needed, strict=True))


def _save(ctx, inputs, output) -> None:
    tiles, weight, position, mean, std, bias, class_row, count = inputs
    wants_tiles, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(tiles if wants_weight else None, weight if wants_tiles else None, mean, std, count)
    ctx.shape, ctx.patch, ctx.class_rows = tiles.shape, weight.shape[-1], int(class_row is not None)
    ctx.dtypes = [None if one is None else one.dtype for one in (tiles, weight, position, bias, class_row)]


def _backward(ctx, grad: Tensor):
    tiles, weight, mean, std, count = ctx.saved_tensors
    if count is not None:
        grad = reference.first_tiles(grad, count)
        if tiles is not None and tiles.is_floating_point():  # padding may hold NaN, and 0 * NaN is NaN
            tiles = reference.first_tiles(tiles, count)
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6)]
    found = _patch_embed_backward(grad, tiles, weight, mean, std, list(ctx.shape), ctx.patch, ctx.class_rows, needed)
    cast = [one.to(dtype) if want else None for one, want, dtype in zip(found, needed, ctx.dtypes, strict=True)]
    return cast[0], cast[1], cast[2], None, None, cast[3], cast[4], None


_patch_embed_backward = library.define(
    "patch_embed_backward(Tensor grad, Tensor? tiles, Tensor? weight, Tensor mean, Tensor std, SymInt[] shape,"
    " SymInt patch, int class_rows, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_patch_embed = library.define(
    "patch_embed(Tensor tiles, Tensor weight, Tensor position, Tensor mean, Tensor std, Tensor? bias,"
    " Tensor? class_row, Tensor? count) -> Tensor",
    _run,
    lambda tiles, weight, position, mean, std, bias, class_row, count: weight.new_empty(len(tiles), *position.shape),
    _backward,
    _save,
)
