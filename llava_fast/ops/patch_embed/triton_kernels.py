"""patch_embed in Triton: one GEMM over patches, read from planar tiles (implicit im2col) or from aligned patch rows.

Every output row is a row of the GEMM, class rows too (with pixels of 0). The folded weight is zero-padded to a multiple
of 16 columns, so that its rows are aligned. Backward: the rows' gradient, summed over tiles, gives the gradients of
position, class row and bias; that of the weight is a GEMM over splits of the rows, added in a fixed order.

FLOPs: 2*tiles*rows*3*P*P*width each way. Bytes: forward reads tiles and weight and writes the rows once each (plus
what the caches miss); backward reads the rows' gradient twice and the tiles once, and writes and reads the float32
parts of the weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops import sums, triton_support
from llava_fast.ops.patch_embed import reference
from llava_fast.ops.triton_support import Config, Specimen


@triton.jit
def centred_pixels(
    tiles_ptr,
    first,
    row,
    end,
    k,
    rows,
    columns,
    height,
    width,
    row_bytes,
    PATCH: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    CLASS_ROWS: tl.constexpr,
):
    """[row, k] of pixel - 128 in float32; 0 for class rows, rows from `end` on, and padding.

    row = first + 0..: index over the rows of all tiles, `rows` each. Offsets from the tile of `first` are 32-bit.
    """
    area: tl.constexpr = PATCH * PATCH
    padded: tl.constexpr = (3 * PATCH * PATCH + 15) // 16 * 16
    first_tile = first // rows
    tile = row // rows - first_tile
    patch = row % rows - CLASS_ROWS
    is_patch = (row < end) & (patch >= 0)
    if PATCH_ROWS:
        base = tiles_ptr + first_tile.to(tl.int64) * (rows - CLASS_ROWS) * row_bytes
        start = (tile * (rows - CLASS_ROWS) + patch) * row_bytes
        place = k
        inside = k < padded
    else:
        plane = height * width
        base = tiles_ptr + first_tile.to(tl.int64) * 3 * plane
        start = tile * 3 * plane + (patch // columns * width + patch % columns) * PATCH
        place = k // area * plane + k % area // PATCH * width + k % PATCH
        inside = k < 3 * area
    mask = is_patch[:, None] & inside[None, :]
    return tl.load(base + (start[:, None] + place[None, :]), mask=mask, other=128).to(tl.float32) - 128.0


@triton.jit
def patch_embed_kernel(
    tiles_ptr,
    weight_ptr,
    offset_ptr,
    position_ptr,
    class_row_ptr,
    out_ptr,
    count_ptr,
    total,
    rows,
    columns,
    height,
    width,
    row_bytes,
    channels,
    PATCH: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    CLASS_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[r] = round(pixels[r] @ weight.T + offset) + position[r % rows], with class_row instead of the product for
    class rows. With count_ptr, rows of tiles from count on are set to zero without computing the product."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    padded: tl.constexpr = (3 * PATCH * PATCH + 15) // 16 * 16
    blocks = tl.cdiv(channels, BLOCK_N)
    first = tl.program_id(0) // blocks * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel = channel < channels
    target = out_ptr + first.to(tl.int64) * channels
    if count_ptr is not None:
        if first >= tl.load(count_ptr) * rows:
            inside = (row < total)[:, None] & is_channel[None, :]
            zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype)
            tl.store(target + ((row - first)[:, None] * channels + channel[None, :]), zeros, mask=inside)
            return
    total_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, padded, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        pixels = centred_pixels(
            tiles_ptr, first, row, total, k, rows, columns, height, width, row_bytes, PATCH, PATCH_ROWS, CLASS_ROWS
        ).to(dtype)
        given = (k < padded)[:, None] & is_channel[None, :]
        weight = tl.load(weight_ptr + (channel[None, :] * padded + k[:, None]), mask=given, other=0.0)
        if UPCAST:
            pixels, weight = pixels.to(tl.float32), weight.to(tl.float32)
        total_MN = tl.dot(pixels, weight, total_MN, input_precision="ieee")
    embedded = (total_MN + tl.load(offset_ptr + channel, mask=is_channel, other=0.0)[None, :]).to(dtype)
    place = row % rows
    if CLASS_ROWS:
        class_row = tl.load(class_row_ptr + channel, mask=is_channel, other=0.0)
        embedded = tl.where((place == 0)[:, None], class_row[None, :], embedded)
    inside = (row < total)[:, None] & is_channel[None, :]
    position = tl.load(position_ptr + (place[:, None] * channels + channel[None, :]), mask=inside, other=0.0)
    out = (embedded.to(tl.float32) + position.to(tl.float32)).to(dtype)
    if count_ptr is not None:
        out = tl.where((row < tl.load(count_ptr) * rows)[:, None], out, 0.0)
    tl.store(target + ((row - first)[:, None] * channels + channel[None, :]), out, mask=inside)


@triton.jit
def patch_weight_gradient_kernel(
    grad_ptr,
    tiles_ptr,
    parts_ptr,
    total,
    rows,
    columns,
    height,
    width,
    row_bytes,
    channels,
    PATCH: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    CLASS_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[part] [channels, padded 3*P*P] = grad.T @ pixels over one of PARTS equal parts of the rows."""
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    padded: tl.constexpr = (3 * PATCH * PATCH + 15) // 16 * 16
    blocks: tl.constexpr = (padded + BLOCK_N - 1) // BLOCK_N
    channel = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    is_channel = channel < channels
    steps = tl.cdiv(tl.cdiv(total, PARTS), BLOCK_K)
    begin = part * steps * BLOCK_K
    total_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, steps):
        first = begin + step * BLOCK_K
        within = tl.arange(0, BLOCK_K)
        inside = is_channel[:, None] & (first + within < total)[None, :]
        place = within[None, :] * channels + channel[:, None]
        grad = tl.load(grad_ptr + first.to(tl.int64) * channels + place, mask=inside, other=0.0)
        pixels = centred_pixels(
            tiles_ptr,
            first,
            first + within,
            total,
            k,
            rows,
            columns,
            height,
            width,
            row_bytes,
            PATCH,
            PATCH_ROWS,
            CLASS_ROWS,
        ).to(dtype)
        if UPCAST:
            grad, pixels = grad.to(tl.float32), pixels.to(tl.float32)
        total_MN = tl.dot(grad, pixels, total_MN, input_precision="ieee")
    target = parts_ptr + part.to(tl.int64) * channels * padded
    tl.store(
        target + (channel[:, None] * padded + k[None, :]), total_MN, mask=is_channel[:, None] & (k < padded)[None, :]
    )


@triton.jit
def fold_gradient_kernel(
    parts_ptr, offset_grad_ptr, mean_ptr, std_ptr, out_ptr, channels, parts, PATCH: tl.constexpr, BLOCK: tl.constexpr
):
    """out[c] = (the sum of parts[:, c] in order + offset_grad[c] (128 - 255 mean)) / (255 std): fold_gradient."""
    area: tl.constexpr = PATCH * PATCH
    padded: tl.constexpr = (3 * PATCH * PATCH + 15) // 16 * 16
    channel = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < 3 * area
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        total += tl.load(parts_ptr + (part * channels + channel) * padded + k, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + k // area, mask=inside, other=0.0)
    std = tl.load(std_ptr + k // area, mask=inside, other=1.0)
    total = (total + tl.load(offset_grad_ptr + channel) * (128.0 - 255.0 * mean)) / (255.0 * std)
    tl.store(out_ptr + channel * 3 * area + k, total.to(out_ptr.dtype.element_ty), mask=inside)


def patch_embed(
    tiles: Tensor,
    weight: Tensor,
    position: Tensor,
    mean: Tensor,
    std: Tensor,
    bias: Tensor | None,
    class_row: Tensor | None,
    count: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    channels, patch = weight.shape[0], weight.shape[-1]
    rows, total = len(position), len(tiles) * len(position)
    out = torch.empty(len(tiles), rows, channels, dtype=weight.dtype, device=weight.device)
    if out.numel():
        folded, offset = reference.fold_normalisation(weight, bias, mean, std)
        folded = F.pad(folded, (0, -folded.shape[1] % 16)).contiguous()
        config = config or triton_support.config(
            _entry("patch_embed_kernel", weight.dtype == torch.float32, tiles.dim() == 3), out.device, total
        )
        grid = (triton.cdiv(total, config["BLOCK_M"]) * triton.cdiv(channels, config["BLOCK_N"]),)
        patch_embed_kernel[grid](
            tiles.contiguous(),
            folded,
            offset,
            position.contiguous(),
            None if class_row is None else class_row.contiguous(),
            out,
            count,
            total,
            rows,
            *_strides(tiles.shape, patch),
            channels,
            patch,
            tiles.dim() == 3,
            int(class_row is not None),
            triton_support.upcast(weight),
            **config,
        )
    return out


def patch_embed_backward(
    grad: Tensor,
    tiles: Tensor | None,
    mean: Tensor,
    std: Tensor,
    shape: tuple[int, ...],
    patch: int,
    class_rows: int,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """As reference.patch_embed_backward, without a gradient of the tiles."""
    _, of_weight, of_position, of_bias, of_class_row = needed
    grad = grad.contiguous()
    by_row = sums.sum_rows(grad.flatten(1), len(grad), dtype=torch.float32).view(grad.shape[1:])
    found: list[Tensor | None] = [None] * 5
    if of_weight or of_bias:
        offset = by_row[class_rows:].sum(dim=0)
        if of_weight and tiles is not None:
            found[1] = weight_gradient(grad, tiles, offset, mean, std, patch, class_rows)
        found[3] = offset.to(grad.dtype) if of_bias else None
    if of_class_row:
        found[4] = by_row[0].to(grad.dtype, copy=True)  # a copy: outputs of an op must not share memory
    if of_position:
        found[2] = by_row.to(grad.dtype)
    return tuple(found)


def weight_gradient(
    grad: Tensor,
    tiles: Tensor,
    offset_grad: Tensor,
    mean: Tensor,
    std: Tensor,
    patch: int,
    class_rows: int,
    config: Config | None = None,
) -> Tensor:
    """[width, 3, P, P] in grad's dtype from grad [tiles, rows, width] and the gradient of the folded bias [width]."""
    count, rows, channels = grad.shape
    out = torch.empty(channels, 3, patch, patch, dtype=grad.dtype, device=grad.device)
    if not out.numel() or not grad.numel():
        return out.zero_()
    taps = 3 * patch * patch
    padded = triton.cdiv(taps, 16) * 16
    entry = _entry("patch_weight_gradient_kernel", grad.dtype == torch.float32, tiles.dim() == 3)
    config = config or triton_support.config(entry, out.device, count * rows)
    parts = torch.empty(config["PARTS"], channels, padded, dtype=torch.float32, device=grad.device)
    grid = (triton.cdiv(channels, config["BLOCK_M"]) * triton.cdiv(padded, config["BLOCK_N"]), config["PARTS"])
    patch_weight_gradient_kernel[grid](
        grad,
        tiles.contiguous(),
        parts,
        count * rows,
        rows,
        *_strides(tiles.shape, patch),
        channels,
        patch,
        tiles.dim() == 3,
        class_rows,
        triton_support.upcast(grad),
        **config,
    )
    config = triton_support.config("fold_gradient_kernel", out.device, channels)
    grid = (channels, triton.cdiv(taps, config["BLOCK"]))
    fold_gradient_kernel[grid](
        parts, offset_grad, mean.float(), std.float(), out, channels, len(parts), patch, **config
    )
    return out


def _strides(shape: torch.Size, patch: int) -> tuple[int, int, int, int]:
    """(patches per row of patches, height, width, bytes of a patch row) of tiles; 1 where their layout has none."""
    if len(shape) == 3:
        return 1, 1, 1, shape[2]
    return max(shape[3] // patch, 1), shape[2], shape[3], 1


def _entry(kernel: str, is_float32: bool, patch_rows: bool) -> str:
    """The name of a kernel's launch configurations: separate for float32, which does not use tensor cores, and for
    patch rows, which are read in aligned vectors."""
    return f"{kernel}_fp32" if is_float32 else f"{kernel}_rows" if patch_rows else kernel


INTEGERS = dict.fromkeys(("total", "rows", "columns", "height", "width", "row_bytes", "channels"), "i32")


def specimens() -> list[Specimen]:
    """How each kernel is compiled, for the compile check."""
    found = []
    for name in ("bf16", "fp16", "fp32"):
        # CLIP ViT-L/14 has a class row, SigLIP none; weight rows need padding for P = 14 but not for P = 16.
        for patch, class_rows, patch_rows in ((14, 1, False), (14, 1, True), (14, 0, False), (16, 0, True)):
            found += [
                _forward_specimen(name, patch, class_rows, patch_rows),
                _backward_specimen(name, patch, class_rows, patch_rows),
            ]
        found += [_forward_specimen(name, 14, 1, patch_rows, counted=True) for patch_rows in (False, True)]
        pointers = dict.fromkeys(("parts_ptr", "offset_grad_ptr", "mean_ptr", "std_ptr"), "*fp32")
        pointers["out_ptr"] = f"*{name}"
        fold = pointers | {"channels": "i32", "parts": "i32"}
        found.append(Specimen("patch_embed", fold_gradient_kernel, fold, {"PATCH": 14}, name, aligned=(*pointers,)))
        found += sums.sum_specimens("patch_embed", name)[:1]
    return [*found, sums.shares_specimen("patch_embed", "fp32")]  # sums are float32 for rows of any dtype


def _forward_specimen(dtype: str, patch: int, class_rows: int, patch_rows: bool, counted: bool = False) -> Specimen:
    pointers = dict.fromkeys(("weight_ptr", "position_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"tiles_ptr": "*u8", "offset_ptr": "*fp32"}
    optional = {"class_row_ptr": (f"*{dtype}", class_rows), "count_ptr": ("*i32", counted)}
    pointers |= {argument: kind for argument, (kind, given) in optional.items() if given}
    absent = {argument: None for argument, (_, given) in optional.items() if not given}
    return _specimen(patch_embed_kernel, dtype, patch, class_rows, patch_rows, pointers, absent, counted)


def _backward_specimen(dtype: str, patch: int, class_rows: int, patch_rows: bool) -> Specimen:
    pointers = {"grad_ptr": f"*{dtype}", "tiles_ptr": "*u8", "parts_ptr": "*fp32"}
    return _specimen(patch_weight_gradient_kernel, dtype, patch, class_rows, patch_rows, pointers, {})


def _specimen(
    kernel: Any,
    dtype: str,
    patch: int,
    class_rows: int,
    patch_rows: bool,
    pointers: dict[str, str],
    absent: dict[str, None],
    counted: bool = False,
) -> Specimen:
    form = "patch rows" if patch_rows else "planar"
    return Specimen(
        "patch_embed",
        kernel,
        pointers | INTEGERS,
        {"PATCH": patch, "PATCH_ROWS": patch_rows, "CLASS_ROWS": class_rows, "UPCAST": False} | absent,
        f"{dtype} P={patch} {form}{' class row' if class_rows else ''}{' counted' if counted else ''}",
        matrix=dtype != "fp32",
        aligned=(*pointers, "channels", *(("row_bytes",) if patch_rows else ("height", "width"))),
        entry=_entry(kernel.__name__, dtype == "fp32", patch_rows),
    )
