"""AnyRes geometry: into which tiles an image is cut, and which of their rows become decoder rows. Integers only.

One frozen `VisualGeometry` defines how a checkpoint processes an image. With an image size it determines `image_views`
(how pixels are resized and cut) and `image_rows` (the decoder rows, in order), so the number of tokens and the number
of features are computed in one place and always agree.

Sources: haotian-liu/LLaVA c121f04 (llava/mm_utils.py, llava/model/llava_arch.py), LLaVA-VL/LLaVA-NeXT df17966
(the same files) and transformers 5.17-5.23 (image_processing_utils.py, models/llava_next). Where they differ,
`compat` chooses: "llava" for the first two, "hf" for the last.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from einops import rearrange

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.preprocessing import Aspect, Filter, Fit, standard_fit
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.base import Tiling
from llava_fast.inputs.tiling.rows import VisualRows, _bilinear_pooling, _block_pooling, _pooled_rows, _rows, check_size

Compat = Literal["hf", "llava"]


@dataclass(frozen=True)
class VisualGeometry:
    """How a checkpoint turns an image or a video into decoder rows. Sizes are in pixels unless named rows.

    aspect      "squash" (resize to a square), "crop" (shorter side to the tile, centre crop), "pad" (mean-coloured
                square), "anyres", or "highres" (one padded square of the largest pinpoint, LLaVA-NeXT).
    pinpoints   canvas sizes as listed in the checkpoint: (height, width) with compat "hf", (width, height) with
                "llava".
    merge       "flat", "spatial", "spatial_unpad"; LLaVA-NeXT also appends "_maxpool2x2" and "_nobase".
    max_tiles   N of anyres_max_N: images with more rows than N tiles are downscaled bilinearly. None: never.
    class_rows  1 if the tower's class row is kept ("full" / "cls_patch"), else 0.
    dropped_rows  1 if the tower returns a class row that is dropped, else 0.
    tile_rows   rows that a connector with learned queries returns for a tile; None: one for each patch.
    fit         how an image becomes one tile, for settings of a processor's file that no `aspect` covers; in an AnyRes
                checkpoint it applies only to several images of one request.
    filter      the resize filter of images.
    convert_rgb  False: an image that is not RGB raises ImageError.
    frame_aspect, frame_fit, frame_filter  the same for a video frame, which becomes one tile regardless of `aspect`.
    frame_class_row  True: all of the tower's rows for a video frame are kept, including its class row.
    tiling      another tiling rule, which replaces `aspect`, `pinpoints` and `merge`.
    multi_image_anyres  False: several images of one request become one tile each, padded to a square (OneVision).
    """

    tile_size: int
    patch_size: int
    aspect: Literal["squash", "crop", "pad", "anyres", "highres"] = "squash"
    pinpoints: tuple[tuple[int, int], ...] = ()
    compat: Compat = "hf"
    merge: str = "flat"
    max_tiles: int | None = None
    class_rows: int = 0
    dropped_rows: int = 0
    tile_rows: int | None = None
    pad_color: tuple[int, int, int] = (0, 0, 0)
    multi_image_anyres: bool = True
    single_tile_newline: bool = True
    fit: Fit | None = None
    filter: Filter = "bicubic"
    convert_rgb: bool = True
    frame_aspect: Aspect = "squash"
    frame_fit: Fit | None = None
    frame_filter: Filter = "bicubic"
    frame_class_row: bool = False
    video_pool: Literal["none", "average", "max", "bilinear"] = "none"
    video_pool_stride: int = 2
    video_pool_stage: Literal["before", "after"] = "before"
    video_newline: Literal["grid", "frame", "one_token", "no_token"] = "no_token"
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        if self.compat not in ("hf", "llava"):
            raise ImageError(f"compat is {self.compat!r}: use 'hf' or 'llava'")
        if self.tile_size < 1 or self.patch_size < 1 or self.tile_size < self.patch_size:
            raise ImageError(f"tile of {self.tile_size} pixels cannot be cut into patches of {self.patch_size}")
        if self.aspect in ("anyres", "highres") and not self.pinpoints:
            raise ImageError(f"aspect {self.aspect!r} needs image_grid_pinpoints, and the checkpoint lists none")
        if self.video_pool != "none" and not 1 <= self.video_pool_stride <= self.side:
            raise ImageError(
                f"a video's rows cannot be pooled by a stride of {self.video_pool_stride}: a tile has {self.side} by "
                f"{self.side} patches"
            )
        for pair in self.pinpoints if self.aspect == "anyres" else ():
            if min(pair) < 1 or pair[0] % self.tile_size or pair[1] % self.tile_size:
                raise ImageError(f"pinpoint {pair} is not a multiple of the tile size {self.tile_size}")

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def rows_per_tile(self) -> int:
        """Number of kept ViT rows of one tile, including the class row if it is kept; or of its connector's rows."""
        return self.side * self.side + self.class_rows if self.tile_rows is None else self.tile_rows

    @property
    def tower_rows_per_tile(self) -> int:
        """Rows that the tower returns for one tile, including dropped ones."""
        return self.rows_per_tile + self.dropped_rows

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """The pinpoints as (height, width), in the listed order: at a tie the first is chosen."""
        return self.pinpoints if self.compat == "hf" else tuple((h, w) for w, h in self.pinpoints)

    def kept_rows(self, tiles: int) -> np.ndarray:
        """The rows of the tower that are kept of the first `tiles` tiles, in order: int32 [tiles * rows_per_tile]."""
        of_all = np.arange(tiles * self.tower_rows_per_tile, dtype=np.int32)
        return of_all.reshape(tiles, -1)[:, self.dropped_rows :].reshape(-1)

    def read_as(self, compat: Compat) -> VisualGeometry:
        """The geometry with another `compat`: the order of sizes in pairs and the rounding of unpadding change."""
        return dataclasses.replace(self, compat=compat)


MOST_PINPOINTS = 4096
"""Most pinpoints that a checkpoint may list; published ones have at most 36."""


def parse_pinpoints(spec: str | list, tile_size: int) -> tuple[tuple[int, int], ...]:
    """Pinpoints from a config: a list of pairs, "(1x1),...,(6x6)" (the full Cartesian product of its first and
    last pair, times the tile size; LLaVA-NeXT mm_utils.py), or highres' "448,672".

    Raises ImageError if the text is none of these, or lists more than MOST_PINPOINTS.
    """
    if isinstance(spec, str):
        text = spec.replace(" ", "")
        if re.search(r"\d{6}", text) or text.count(",") > 2 * MOST_PINPOINTS:
            raise ImageError(f"image_grid_pinpoints {reprlib.repr(spec)} are larger or more than any checkpoint's")
        if span := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", text):
            a0, b0, a1, b1 = map(int, span.groups())
            if (a1 + 1 - a0) * (b1 + 1 - b0) > MOST_PINPOINTS:
                raise ImageError(f"image_grid_pinpoints {spec!r} are more than {MOST_PINPOINTS}")
            return tuple((a * tile_size, b * tile_size) for a in range(a0, a1 + 1) for b in range(b0, b1 + 1))
        if re.fullmatch(r"\d+(,\d+)*", text):
            return tuple((int(edge), int(edge)) for edge in text.split(","))
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        if not re.fullmatch(r"[\d\[\](),]+", text) or not numbers or len(numbers) % 2:
            raise ImageError(
                f"image_grid_pinpoints {spec!r} is neither a list of pairs nor of the form '(1x1),...,(6x6)'"
            )
        return tuple(zip(numbers[::2], numbers[1::2], strict=True))
    return tuple((int(a), int(b)) for a, b in spec)


def best_canvas(height: int, width: int, canvases: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) of the canvas that keeps most of the image; at a tie the one that wastes least, then the
    first listed."""
    best, best_kept, best_waste = canvases[0], -1, 0
    for canvas_h, canvas_w in canvases:
        scale = min(canvas_w / width, canvas_h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_h * canvas_w - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = (canvas_h, canvas_w), kept, waste
    return best


def fit_within(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of an image resized to fit a canvas, keeping the aspect ratio; the other side is rounded
    up."""
    canvas_h, canvas_w = canvas
    scale_w, scale_h = canvas_w / width, canvas_h / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * scale_h), canvas_w)


def unpad(height: int, width: int, grid: tuple[int, int], compat: Compat) -> tuple[int, int, int, int]:
    """The part of a `grid` (rows, columns) of features that is image and not padding: (top, left, height, width).

    The crop is symmetric, so an odd remainder is kept: kept = side - 2 * ((side - new) // 2). A side can be 0.
    """
    rows, cols = grid
    if width / height > cols / rows:
        exact = height * (cols / width)
        new = int(round(exact, 7)) if compat == "hf" else int(exact)
        cut = (rows - new) // 2
        return cut, 0, rows - 2 * cut, cols
    exact = width * (rows / height)
    new = int(round(exact, 7)) if compat == "hf" else int(exact)
    cut = (cols - new) // 2
    return 0, cut, rows, cols - 2 * cut


@functools.lru_cache(maxsize=4096)
def image_views(geometry: VisualGeometry, height: int, width: int, alone: bool = True) -> tuple[View, ...]:
    """The resizes that make an image's tiles, base view first (or in the order of `geometry.tiling`).

    alone: False for one of several images of a request, each of which is a single padded tile in LLaVA-OneVision.
    Raises ImageError for an empty image, and for one that the checkpoint's processor does not support.
    """
    check_size(height, width)
    if geometry.tiling is not None:
        return geometry.tiling.views(geometry, height, width)
    tile, aspect, filter = geometry.tile_size, geometry.aspect, geometry.filter
    if aspect in ("anyres", "highres") and not (alone or geometry.multi_image_anyres):
        aspect = "pad"
    if aspect in ("pad", "crop", "squash"):
        return (_tile_view(geometry, geometry.fit or standard_fit(aspect, tile), height, width),)
    base = View(size=(tile, tile), offset=(0, 0), canvas=(tile, tile), filter=filter)
    if aspect == "highres":
        edge = max(max(pair) for pair in geometry.pinpoints)
        return (base, View((edge, edge), (0, 0), (edge, edge), True, geometry.pad_color, filter))
    canvas = best_canvas(height, width, geometry.canvases)
    size = fit_within(height, width, canvas)
    offset = ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)
    return (base, View(size=size, offset=offset, canvas=canvas, filter=filter))


@functools.lru_cache(maxsize=512)
def image_rows(geometry: VisualGeometry, height: int, width: int, alone: bool = True) -> VisualRows:
    """The decoder rows of one image of this size. Arguments as in `image_views`; arrays are read-only."""
    views = image_views(geometry, height, width, alone)
    if geometry.tiling is not None:
        return geometry.tiling.rows(geometry, height, width)
    base = geometry.kept_rows(1)
    merge = geometry.merge
    if len(views) == 1:
        newline = "unpad" in merge and geometry.single_tile_newline
        return _rows([base, None] if newline else [base], tiles=1)

    canvas = views[1].canvas
    grid = (canvas[0] // geometry.tile_size, canvas[1] // geometry.tile_size)
    tiles = 1 + grid[0] * grid[1]
    if not merge.startswith("spatial"):
        return _rows([geometry.kept_rows(tiles)], tiles)
    if geometry.class_rows:
        raise ImageError("a class row cannot be stitched into a grid: use feature selection 'patch' with anyres")

    stitched = _stitch(geometry, grid)
    head = [] if "nobase" in merge else [base]
    if "maxpool2x2" in merge:
        pooling = _block_pooling(stitched, 2)
        return _pooled_rows(head, pooling, pooling[0].shape[:2], newline=False, tiles=tiles, reduce="max")
    if "unpad" not in merge:
        return _rows([*head, stitched.reshape(-1)], tiles)
    top, left, kept_h, kept_w = unpad(height, width, stitched.shape, geometry.compat)
    window = stitched[top : top + kept_h, left : left + kept_w]
    if geometry.max_tiles is not None:
        ratio = math.sqrt(kept_h * kept_w / (geometry.max_tiles * geometry.side**2))
        if ratio > 1.1:
            shape = (int(kept_h // ratio), int(kept_w // ratio))
            if min(shape) < 1:
                raise ImageError(
                    f"an image of {width}x{height} pixels leaves no rows after anyres_max_{geometry.max_tiles} "
                    "shrinks it; crop it or pad it to a less extreme shape"
                )
            return _pooled_rows(head, _bilinear_pooling(window, shape), shape, newline=True, tiles=tiles, reduce="sum")
    return _rows([*head, *(part for line in window for part in (line, None))], tiles)


def count_image_rows(geometry: VisualGeometry, height: int, width: int) -> int:
    """The number of decoder rows of one image of this size: the length of `image_rows`."""
    return len(image_rows(geometry, height, width))


def _tile_view(geometry: VisualGeometry, fit: Fit, height: int, width: int) -> View:
    """One tile of the whole image, according to `fit`. Raises ImageError."""
    tile, given = geometry.tile_size, (max(height, width),) * 2 if fit.square else (height, width)
    size = fit.size.of(*given) if fit.size else given
    if min(size) < (tile if fit.square else 1) or (size != (tile, tile) and not fit.crop):
        raise ImageError(
            f"the checkpoint's image processor makes {size[1]}x{size[0]} pixels of an image of {width}x{height}, and "
            f"its tower reads {tile}x{tile}: give images of another shape, or change size, do_resize or do_center_crop "
            "in its preprocessor_config.json"
        )
    if fit.square and not all(0 <= value <= 255 for value in geometry.pad_color):
        raise ImageError(f"the padding colour {geometry.pad_color}, image_mean times 255, is not in 0..255")
    offset = (-((size[0] - tile) // 2), -((size[1] - tile) // 2))
    return View(
        size, offset, (tile, tile), fit.square, geometry.pad_color if fit.square else (0, 0, 0), geometry.filter
    )


def tower_rows_of_tile(geometry: VisualGeometry) -> np.ndarray:
    """The patches of one tile as rows of the tower: int32 [side * side]."""
    return np.arange(geometry.side**2, dtype=np.int32) + geometry.dropped_rows + geometry.class_rows


def _stitch(geometry: VisualGeometry, grid: tuple[int, int]) -> np.ndarray:
    """ViT row numbers of the grid's tiles, arranged as one image: int32 [grid_h * side, grid_w * side]."""
    side = geometry.side
    tile = np.arange(1, 1 + grid[0] * grid[1], dtype=np.int32) * geometry.tower_rows_per_tile  # 0 is the base view
    rows = tile[:, None] + tower_rows_of_tile(geometry)
    return rearrange(rows, "(gh gw) (h w) -> (gh h) (gw w)", gh=grid[0], gw=grid[1], h=side, w=side)
