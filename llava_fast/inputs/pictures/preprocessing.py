"""How an image processor turns an image into one tile: its settings, with transformers' names.

Sources: transformers 5.17-5.24, image_processing_backends.PilBackend and image_transforms.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
"""Pillow's resize filters, in the order of their numbers (PIL.Image.Resampling, 0 to 5)."""

Triple = tuple[float, float, float]
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Size:
    """The target size of a resize, as `size` in a processor's file; the fields that are set determine the mode.

    height and width: exactly this size. shortest_edge: the shorter side, keeping the aspect ratio; with longest_edge,
    less if the longer side would exceed that. max_height and max_width: the largest that fits, keeping the aspect
    ratio.
    """

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None

    def of(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this size is resized to; a side may come out as 0."""
        if self.shortest_edge and self.longest_edge:
            return self._between(height, width, self.shortest_edge, self.longest_edge)
        if self.shortest_edge:
            edge = self.shortest_edge
            return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
        if self.max_height and self.max_width:
            scale = min(self.max_height / height, self.max_width / width)
            return int(height * scale), int(width * scale)
        assert self.height
        assert self.width
        return self.height, self.width

    @staticmethod
    def _between(height: int, width: int, edge: int, longest: int) -> tuple[int, int]:
        exact: float = edge
        short, long = float(min(height, width)), float(max(height, width))
        if long / short * edge > longest:
            exact = longest * short / long
            edge = round(exact)
        if min(height, width) == edge:
            return height, width
        return (int(exact * height / width), edge) if width < height else (edge, int(exact * width / height))

    def fields(self) -> dict[str, int]:
        """The fields as in a processor's file."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Fit:
    """How an image becomes a square tile.

    square  pad it first to a square of its longer side with the mean colour.
    size    resize it to this size; None: do not resize.
    crop    then crop the centre to the tile's size, padding with black if the image is smaller. False: do not crop; an
            image of another size raises ImageError.
    """

    square: bool
    size: Size | None
    crop: bool


Aspect = Literal["squash", "crop", "pad"]


def standard_fit(aspect: Aspect, tile: int) -> Fit:
    """The Fit of each aspect: SigLIP's "squash", CLIP's "crop", LLaVA-1.5's "pad"."""
    if aspect == "squash":
        return Fit(square=False, size=Size(height=tile, width=tile), crop=False)
    return Fit(square=aspect == "pad", size=Size(shortest_edge=tile), crop=True)


def name_fit(fit: Fit, tile: int) -> tuple[Aspect, Fit | None]:
    """(an aspect equivalent to this fit, None), or (the nearest aspect, the fit itself)."""
    exact, shortest = Size(height=tile, width=tile), Size(shortest_edge=tile)
    if fit.size == exact or (fit.square and fit.size == shortest):
        return ("pad" if fit.square else "squash"), None
    if fit == standard_fit("crop", tile):
        return "crop", None
    return ("pad" if fit.square else "crop"), fit


@dataclass(frozen=True)
class Preprocessing:
    """The settings of an image processor that change a tile."""

    fit: Fit
    filter: Filter = "bicubic"
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Triple = CLIP_MEAN
    image_std: Triple = CLIP_STD
    do_convert_rgb: bool = True

    VALUES: ClassVar[tuple[str, ...]] = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")

    def values(self) -> dict[str, Any]:
        """The settings of `fold_values`, by name."""
        return {name: getattr(self, name) for name in self.VALUES}


def may_fold(std: Sequence[float]) -> bool:
    """Whether normalisation with this std, for pixels in 0..1, may be folded into a patch embedding (ops.patch_embed).
    Values far above one, as from pixels that are not rescaled, would suffer from cancellation."""
    return min(std) > 1 / 32


def fold_values(
    do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel such that (pixel / 255 - mean) / std is the output of a processor with these settings."""
    scale = 255 * (rescale_factor if do_rescale else 1.0)
    mean, std = (image_mean, image_std) if do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
