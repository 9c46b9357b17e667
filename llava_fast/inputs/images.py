"""Reading images into uint8 arrays, and cutting an image into the uint8 tiles of a vision tower."""

from __future__ import annotations

import base64
import binascii
import io
import os
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps

import llava_fast._C as _C
from llava_fast.errors import ImageError, MissingFileError

if TYPE_CHECKING:
    from llava_fast.inputs.anyres import View
    from llava_fast.inputs.preprocessing import Filter

PillowOrder = Literal["12.1", "12", "13"]


def _installed_order() -> PillowOrder:
    version = tuple(int(part) for part in PIL.__version__.split(".")[:2])
    return "13" if version >= (13, 0) else "12" if version >= (12, 2) else "12.1"


INSTALLED_PILLOW: PillowOrder = _installed_order()
"""The order of resize passes of the installed Pillow: see `resize`."""

TORCH_MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
"""Filter -> torch's interpolation of the same kind, where torchvision has one for uint8."""


def open_image(source: Any, exif: bool = True, alpha: Literal["drop", "white"] = "drop") -> np.ndarray:
    """The pixels of an image as uint8 [height, width, 3], C-contiguous; may be read-only or shared with `source`.

    source  a path (str or PathLike), the bytes of a file, a `data:` URI, a PIL image, or a uint8 array [H, W],
            [H, W, 3] or [H, W, 4].
    exif    turn a file upright by its EXIF orientation, as transformers' load_image does (the original LLaVA does
            not). PIL images and arrays are never turned, as in transformers' processors.
    alpha   "drop" ignores transparency: PIL's convert("RGB"), which the original LLaVA and transformers' load_image
            use. "white" blends onto white, as newer transformers (5.23, image_transforms.convert_to_rgb) does with
            PIL images and arrays handed to a processor.
    Raises ImageError for anything that cannot be read, FileNotFoundError for a missing file, TypeError for another
    kind of source.
    """
    if alpha not in ("drop", "white"):
        raise ValueError(f'alpha must be "drop" or "white", not {alpha!r}')
    if isinstance(source, np.ndarray):
        return _from_array(source, alpha)
    if isinstance(source, Image.Image):
        return _from_pil(source, f"PIL image ({source.mode}, {source.width}x{source.height})", False, alpha)
    image, name = open_header(source)
    with image:
        return _from_pil(image, name, exif, alpha)


def open_header(source: Any) -> tuple[Image.Image, str]:
    """A path, bytes or data URI as a PIL image of which only the header is read, and what an error calls it. Raises
    as `open_image` does."""
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise TypeError(f"an image is a path, bytes, data URI, PIL image or uint8 array, not {type(source).__name__}")
    name = source_name(source)
    file = source_file(source, name)
    try:
        return Image.open(file), name
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} is not an image of a kind that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's format plugins raise many kinds on bad files
        raise ImageError(f"{name} cannot be read: {error}") from error


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    *,
    filter: Filter = "bicubic",
    pillow: PillowOrder | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Pillow's resize, to the bit: uint8 [H, W, 3] to uint8 [*size, 3], size as (height, width).

    filter   "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos": Pillow's of that name.
    pillow   which Pillow's order of passes. "12.1" (and before): the horizontal pass first. "12" (12.2 and 12.3, PR
             9524 of python-pillow): the vertical one if the height shrinks and is over 100 times the width. "13" (PR
             9549): the vertical one if the height loses more than twice as many rows as the width loses columns.
             None: as the installed Pillow does.
    threads  0 for all the processor's, or what OMP_NUM_THREADS says.
    The instruction set is the best one here, or LLAVA_FAST_SIMD (scalar, avx2, avx512); the pixels are the same.
    """
    return _C.resize(_pixels(image), *size, filter, pillow or INSTALLED_PILLOW, threads or _all_threads())


def make_tiles(
    image: np.ndarray,
    views: Sequence[View],
    tile_size: int,
    *,
    pillow: PillowOrder | None = None,
    resample: Literal["pillow", "torchvision"] = "pillow",
    threads: int = 0,
    layout: Literal["planar", "patch_rows"] = "planar",
    patch_size: int = 14,
) -> np.ndarray:
    """The uint8 tiles of an image: each view (llava_fast.inputs.anyres.View) resized, placed and cut, in turn.

    image       uint8 [H, W, 3].
    resample    "pillow" is Pillow's resize to the bit; "torchvision" is what torchvision's v2 resize does with uint8
                on the CPU (torch's own, antialiased), which differs by up to 2 levels and has only the filters of
                TORCH_MODES. Needs torch, not torchvision.
    pillow, threads  as in `resize`.
    layout      "planar": [tiles, 3, tile_size, tile_size]. "patch_rows": [tiles, (tile_size // patch_size)**2,
                3 * patch_size**2 rounded up to 16], a row being one patch in (channel, y, x) order and then zeros: an
                aligned GEMM operand. Pixels beyond the last whole patch are left out, as a convolution does.
    Raises ValueError for views whose canvas is not a multiple of the tile, a filter that `resample` does not have, or
    an image of another shape or dtype.
    """
    if resample not in ("pillow", "torchvision"):
        raise ValueError(f'resample must be "pillow" or "torchvision", not {resample!r}')
    if layout not in ("planar", "patch_rows"):
        raise ValueError(f'layout must be "planar" or "patch_rows", not {layout!r}')
    image = _pixels(image)
    options = (tile_size, pillow or INSTALLED_PILLOW, threads or _all_threads(), layout == "patch_rows", patch_size)
    if resample == "pillow":
        return _C.make_tiles(image, [_fields(view) for view in views], *options)
    stacks = []
    for view in views:  # resized by torch; the compiled code then only places and cuts
        resized = _torchvision_resize(_square(image, view.fill) if view.square else image, view.size, view.filter)
        stacks.append(_C.make_tiles(resized, [(False, *_fields(view)[1:])], *options))
    return np.concatenate(stacks)


class TilePlan(NamedTuple):
    """The tiles of a batch of images as integers, so that a device can make them (llava_fast.ops.image_tiles).

    jobs          int32 [jobs, 28]: one view of one image each (TileJob in csrc/image/tile_plan.h).
    words         int32: the filters' tables, each once.
    tile          side of a tile; patch: side of a patch for patch rows, 0 for planar tiles.
    tiles         tiles of the whole batch; pixel_bytes: bytes of all its images, one after another.
    middle_bytes  memory between the two passes; first_pixels, canvas_pixels: the largest job of each.
    taps          most taps of a filter.
    """

    jobs: np.ndarray
    words: np.ndarray
    tile: int
    patch: int
    tiles: int
    pixel_bytes: int
    middle_bytes: int
    first_pixels: int
    canvas_pixels: int
    taps: int


class UncutImages(NamedTuple):
    """Images whose tiles a device is to make: their pixels, uint8 [bytes], one image after another, and the plan."""

    pixels: np.ndarray
    plan: TilePlan


def plan_tiles(
    sizes: Sequence[tuple[int, int]],
    views: Sequence[Sequence[View]],
    tile_size: int,
    *,
    pillow: PillowOrder | None = None,
    patch_size: int = 0,
) -> TilePlan:
    """What `make_tiles` would do with images of these sizes (height, width), as integers; views: of each image.

    patch_size  0 for planar tiles, else that of the layout "patch_rows". Raises ValueError as `make_tiles` does.
    """
    fields = [[_fields(view) for view in of_one] for of_one in views]
    layout = (patch_size > 0, patch_size or 1)
    made = _C.plan_tiles([tuple(size) for size in sizes], fields, tile_size, pillow or INSTALLED_PILLOW, *layout)
    jobs = made["jobs"].view(np.int32)
    taps = int(jobs[:, _AXIS_WIDTHS].max()) if len(jobs) else 0
    pixel_bytes = sum(3 * height * width for height, width in sizes)
    work = (made["middle_bytes"], made["first_pixels"], made["canvas_pixels"])
    return TilePlan(jobs, made["words"], tile_size, patch_size, made["tiles"], pixel_bytes, *work, taps)


def _fields(view: View) -> tuple:
    """A view as csrc takes it."""
    return view.square, view.size, view.offset, view.canvas, view.fill, view.filter


_AXIS_WIDTHS = [22, 26]  # the places of x.width and y.width among a TileJob's words


def _pixels(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"the image must be a uint8 array [height, width, 3], not {kind}: use open_image")
    return np.ascontiguousarray(image)


def _all_threads() -> int:
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdigit() and int(limit) > 0:
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _square(image: np.ndarray, fill: tuple[int, int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = fill
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _torchvision_resize(image: np.ndarray, size: tuple[int, int], filter: Filter) -> np.ndarray:
    import torch

    if filter not in TORCH_MODES:
        raise ValueError(f"torchvision resizes {', '.join(TORCH_MODES)} only, not {filter}: use resample='pillow'")
    if tuple(size) == image.shape[:2]:
        return image
    pixels = torch.tensor(image).permute(2, 0, 1)[None]
    antialias = filter != "nearest"
    resized = torch.nn.functional.interpolate(pixels, tuple(size), mode=TORCH_MODES[filter], antialias=antialias)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def source_name(source: Any) -> str:
    """What an error calls an image or video."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the image or video given as {len(source)} bytes"
    if isinstance(source, str) and source.startswith("data:"):
        return f"the data URI of {len(source)} characters"
    text = os.fsdecode(source)
    return repr(text if len(text) <= 200 else text[:200] + "...")


def source_file(source: Any, name: str) -> Any:
    """What to open: a path, or the bytes as a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        data = _decode_data_uri(source, name)
    else:
        path = os.fsdecode(source)
        if path.lower().startswith(("http://", "https://")):
            raise ImageError(f"{name} is a web address, which is not fetched: download it and give the path or bytes")
        if not os.path.exists(path):
            raise MissingFileError(f"no image or video file {name}")
        if os.path.isdir(path):
            raise ImageError(f"{name} is a folder, not an image or video file")
        if os.path.getsize(path) == 0:
            raise ImageError(f"{name} is empty (0 bytes)")
        return path
    if not data:
        raise ImageError(f"{name} is empty")
    return io.BytesIO(data)


def _decode_data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(f'{name} has no comma before its data: write "data:image/png;base64,..."')
    raw = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(raw)
    except binascii.Error as error:
        raise ImageError(f"{name} is not valid base64: {error}") from None


def _from_array(image: np.ndarray, alpha: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise ImageError(
            f"an image array must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {image.dtype} {list(image.shape)}"
        )
    if 0 in image.shape:
        raise ImageError(f"the image array has no pixels: its shape is {list(image.shape)}")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    elif image.shape[2] == 4 and alpha == "white":
        opacity = image[..., 3:] / 255
        image = np.round(opacity * image[..., :3] + (1 - opacity) * 255).astype(np.uint8)
    return np.ascontiguousarray(image[..., :3])


def require_rgb(source: Any) -> None:
    """Raises ImageError for a PIL image or an array of other channels than RGB."""
    mode = source.mode if isinstance(source, Image.Image) else "RGB" if np.shape(source)[2:] == (3,) else "another"
    if mode != "RGB":
        raise ImageError(
            f"the image's mode is {mode}, and the checkpoint does not convert it (do_convert_rgb is false)"
        )


def check_pixels(width: int, height: int, name: str) -> None:
    """Raises ImageError for an image without pixels, and for one of more than Pillow's limit."""
    pixels, limit = width * height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ImageError(
            f"{name} has {pixels} pixels and the limit is {limit}: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    if pixels == 0:
        raise ImageError(f"{name} has no pixels")


def _from_pil(image: Image.Image, name: str, exif: bool, alpha: str) -> np.ndarray:
    check_pixels(image.width, image.height, name)
    try:
        image.load()
        if exif:
            image = ImageOps.exif_transpose(image)
        if alpha == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # truncated or corrupt data: Pillow's decoders raise many kinds
        raise ImageError(f"{name} cannot be decoded: {error}") from error
