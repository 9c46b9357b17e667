"""Reads the settings of image and video processors from the files that transformers reads, and writes them.

Every field that changes the model's inputs has its effect or raises an error that names it. A field that transformers
does not read has no effect there or here; a warning in the log `llava_fast.checkpoints` names it, and saving in the
same layout keeps it.

Sources: transformers 5.17-5.24, image_processing_base.py and video_processing_utils.py (which file counts),
models/{clip,siglip,llava,llava_next,llava_onevision}/image_processing_pil_*.py (defaults and steps).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.inputs.pictures.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    FILTERS,
    Filter,
    Fit,
    Preprocessing,
    Size,
    Triple,
    fold_values,
    name_fit,
    standard_fit,
)
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.files import read_json_if_there

logger = logging.getLogger("llava_fast.checkpoints")


@dataclass(frozen=True)
class Kind:
    """Defaults of one of transformers' processors. `squares`: do_pad pads an image to a square with the mean colour (in
    others do_pad pads a batch, which tiles of one size do not need).
    """

    name: str
    crops: bool = True
    squares: bool = False
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    filter: Filter = "bicubic"
    own_fields: frozenset[str] = frozenset()

    def fit(self, tile: int) -> Fit:
        return standard_fit("crop" if self.crops else "squash", tile)


CLIP_KIND = Kind("CLIPImageProcessor")
SIGLIP_KIND = Kind("SiglipImageProcessor", crops=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SIGLIP2_KIND = dataclasses.replace(
    SIGLIP_KIND,
    name="Siglip2ImageProcessor",
    filter="bilinear",
    own_fields=frozenset({"patch_size", "max_num_patches"}),
)


@dataclass(frozen=True)
class Settings:
    """The content of a processor's file, or of its section in one, and its name in errors."""

    content: Mapping[str, Any]
    where: str

    def get(self, field: str, default: Any = None) -> Any:
        """The field, or the default if the file lacks it. A null is False for a bool, as in transformers, and otherwise
        the default, where transformers fails if it needs the field.
        """
        value = self.content.get(field, default)
        return value if value is not None else False if isinstance(default, bool) else default

    def refuse(self, field: str, why: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {field} is {self.content.get(field)!r}; {why}")


def image_settings(path: Path) -> Settings:
    """The image settings that transformers reads: their section of processor_config.json, else their own file."""
    section = _section(path, "image_processor")
    return section or _file(path, "preprocessor_config.json") or Settings({}, str(path / "preprocessor_config.json"))


def video_settings(path: Path) -> Settings:
    """The video settings that transformers reads; those of images if there is no file for videos."""
    own = _section(path, "video_processor") or _file(path, "video_preprocessor_config.json")
    return own or _file(path, "preprocessor_config.json") or image_settings(path)


def _file(path: Path, name: str) -> Settings | None:
    file = path / name
    return Settings(read_json_if_there(file, fields.ImageProcessor), str(file)) if file.exists() else None


def _section(path: Path, name: str) -> Settings | None:
    file = path / "processor_config.json"
    content = read_json_if_there(file, fields.Processor).get(name)
    return None if content is None else Settings(content, f"{file}: {name}")


def image_kind(settings: Settings, allowed: tuple[Kind, ...]) -> Kind:
    """The image processor named in the settings; by default the first allowed one."""
    field = "image_processor_type" if settings.get("image_processor_type") else "feature_extractor_type"
    named = (settings.get(field) or allowed[0].name).replace("FeatureExtractor", "ImageProcessor")
    kinds = {kind.name: kind for kind in allowed}
    name = named.removesuffix("Fast").removesuffix("Pil")
    if name not in kinds:
        settings.refuse(field, f"supported for this model: {', '.join(kinds)}")
    return kinds[name]


def check_video(settings: Settings, kind: Kind) -> None:
    """Raises CheckpointError for the settings of another video processor, or one that chooses frames."""
    if settings.get("video_processor_type") not in (None, kind.name):
        settings.refuse("video_processor_type", f"supported for this model: {kind.name}")
    if settings.get("do_sample_frames", False):
        settings.refuse("do_sample_frames", "load(video_frames=...) chooses the frames: set it to false")


def read_preprocessing(settings: Settings, kind: Kind, tile: int) -> Preprocessing:
    """How these settings turn an image or a frame into one tile of `tile` pixels. Defaults are transformers', except
    sizes, which are the tower's.
    """
    if settings.get("input_data_format") not in (None, "channels_last"):
        settings.refuse("input_data_format", "arrays are [height, width, channels] here: leave it out")
    if settings.get("use_square_size", False):
        settings.refuse("use_square_size", 'it stands for a size: write "size": {"height": ..., "width": ...}')
    pads = settings.get("do_pad", False) and settings.get("pad_size") is not None
    if pads and kind.name in (CLIP_KIND.name, SIGLIP_KIND.name):
        settings.refuse("pad_size", f"tiles have the {tile}x{tile} pixels that the vision tower reads: leave it out")
    known = KNOWN | kind.own_fields
    if unknown := sorted(name for name in settings.content if name not in known and settings.get(name) is not None):
        logger.warning("%s: %s is unknown and has no effect", settings.where, ", ".join(unknown))
    squares = kind.squares and settings.get("do_pad", False)
    if squares and settings.content.get("image_mean", kind.mean) is None:
        settings.refuse("image_mean", "it is the colour that images are padded with: give it, or leave the field out")
    found = Preprocessing(
        fit=_fit(settings, kind, tile),
        filter=FILTERS[settings.get("resample", FILTERS.index(kind.filter))],
        do_rescale=settings.get("do_rescale", True),
        rescale_factor=settings.get("rescale_factor", 1 / 255),
        do_normalize=settings.get("do_normalize", True),
        image_mean=_triple(settings.get("image_mean", kind.mean)),
        image_std=_triple(settings.get("image_std", kind.std)),
        do_convert_rgb=settings.get("do_convert_rgb", True),
    )
    return padded(found, settings, tile) if squares else found


def padded(preprocessing: Preprocessing, settings: Settings, tile: int) -> Preprocessing:
    """The same preprocessing after padding to a square with the mean colour. Raises CheckpointError."""
    size = preprocessing.fit.size
    if preprocessing.fit.crop and (size is None or min(size.of(tile, tile)) < tile):
        settings.refuse(
            "do_resize" if size is None else "size",
            "images are padded to a square, and one smaller than the crop would get margins of two colours",
        )
    if not all(0 <= value <= 255 for value in pad_color(preprocessing.image_mean)):
        settings.refuse("image_mean", "it is the colour that images are padded with too, so it must lie in 0..1")
    return dataclasses.replace(preprocessing, fit=dataclasses.replace(preprocessing.fit, square=True))


KNOWN = {*fields.ImageProcessor.model_fields, "aspect_ratio_setting", "_valid_processor_keys"}
"""Fields that transformers reads, and two that its earlier releases wrote into every file."""


def _fit(settings: Settings, kind: Kind, tile: int) -> Fit:
    """Raises CheckpointError for settings that never produce the tower's image size."""
    resizes, crops = settings.get("do_resize", True), settings.get("do_center_crop", kind.crops)
    size = _size(settings, kind, tile) if resizes else None
    crop = _crop_size(settings)
    if crops and crop not in (None, (tile, tile)):
        _refuse_side(settings, "crop_size", crop[0], tile)
    # Without crop_size transformers uses a default that fits no tower here, so cropping must not change the image.
    sure = (Size(height=tile, width=tile), Size(shortest_edge=tile))
    known = size is None or (not crops and bool(size.longest_edge or size.max_height))
    if size is not None and not known and size not in sure and not (crops and crop):
        _refuse_side(settings, "size", next(iter(size.fields().values())), tile)
    return Fit(False, size, crops)


def _refuse_side(settings: Settings, field: str, side: int, tile: int) -> NoReturn:
    settings.refuse(field, f"it makes images of {side} pixels, the vision tower reads {tile}: correct it")


def _size(settings: Settings, kind: Kind, tile: int) -> Size:
    given = settings.get("size")
    if given is None:
        size = kind.fit(tile).size
        assert size is not None
        return size
    if isinstance(given, list):
        given = dict(zip(("height", "width"), given, strict=True))
    if isinstance(given, int):
        square = settings.get("default_to_square", False)
        given = {"height": given, "width": given} if square else {"shortest_edge": given}
    stated = {name: value for name, value in given.items() if value is not None}
    if set(stated) not in _SIZES or not all(stated.values()):
        settings.refuse("size", f"it must have, above 0, {' or '.join(' and '.join(sorted(s)) for s in _SIZES)}")
    return Size(**stated)


_SIZES = ({"height", "width"}, {"shortest_edge"}, {"longest_edge", "shortest_edge"}, {"max_height", "max_width"})


def _crop_size(settings: Settings) -> tuple[int, int] | None:
    given = settings.get("crop_size")
    if isinstance(given, int):
        return given, given
    if isinstance(given, list):
        return given[0], given[1]
    if given is None:
        return None
    if set(given) != {"height", "width"} or None in given.values():
        settings.refuse("crop_size", "it must have height and width")
    return given["height"], given["width"]


def check_anyres(settings: Settings, kind: Kind, tile: int) -> None:
    """Raises CheckpointError unless base view and grid tiles have the tower's size after a single resize."""
    size, crop = _size(settings, kind, tile), _crop_size(settings)
    base = (size.height, size.width) if size.height else (size.shortest_edge, size.shortest_edge)
    if base != (tile, tile) or size.of(tile, tile) != (tile, tile):
        settings.refuse("size", f"AnyRes tiles have the {tile}x{tile} pixels that the vision tower reads: correct it")
    if crop not in (None, (tile, tile)):
        settings.refuse(
            "crop_size", f"AnyRes tiles have the {tile}x{tile} pixels that the vision tower reads: correct it"
        )


def check_pinpoints(settings: Settings, expected: tuple[tuple[int, int], ...]) -> None:
    """Raises CheckpointError for pinpoints other than config.json's: images would be cut by one list and reassembled by
    the other.
    """
    given = settings.get("image_grid_pinpoints")
    if given is not None and tuple(tuple(pair) for pair in given) != expected:
        settings.refuse("image_grid_pinpoints", "config.json has others: make them equal")


def check_tokens(path: Path, tokenizer: Any, **ids: int | None) -> None:
    """Raises CheckpointError where processor_config.json names other image and video tokens than config.json, whose
    `ids` count here. transformers writes its tokens into a prompt, unless the tokenizer names its own."""
    file = path / "processor_config.json"
    given = read_json_if_there(file, fields.Processor)
    for field, token_id in ids.items():
        token = given.get(field)
        if None in (token, token_id) or hasattr(tokenizer, field):
            continue
        if tokenizer.convert_tokens_to_ids(token) != token_id:
            raise CheckpointError(f"{file}: {field} is {token!r}, which is not token {token_id} of config.json")


def written(preprocessing: Preprocessing, tile: int, kind: Kind) -> dict[str, Any]:
    """The fields with which a processor of this kind does exactly this preprocessing."""
    fit = preprocessing.fit
    size = fit.size or Size(shortest_edge=tile)
    made: dict[str, Any] = {
        "video_processor_type" if kind.name.endswith("VideoProcessor") else "image_processor_type": kind.name,
        "do_convert_rgb": preprocessing.do_convert_rgb,
        "do_resize": fit.size is not None,
        "size": size.fields(),
        "resample": FILTERS.index(preprocessing.filter),
        "do_center_crop": fit.crop,
        **preprocessing.values(),
    }
    made |= {"image_mean": list(preprocessing.image_mean), "image_std": list(preprocessing.image_std)}
    if fit.crop:
        made["crop_size"] = {"height": tile, "width": tile}
    return made | ({"do_pad": fit.square} if kind.squares else {})


def tower_kind(tower: TowerConfig | type[TowerConfig]) -> Kind:
    """The image processor of a tower's own repository: CLIP's crops, SigLIP's squashes."""
    mean, std = (_triple(list(values)) for values in tower.own_normalisation)
    own = SIGLIP2_KIND if tower.native_sizes else CLIP_KIND if tower.own_aspect == "crop" else SIGLIP_KIND
    return dataclasses.replace(own, mean=mean, std=std)


def tower_fit(tower: TowerConfig | type[TowerConfig], tile: int) -> Fit:
    """How a tower's own image processor makes a tile."""
    return tower_kind(tower).fit(tile)


def geometry_fields(images: Preprocessing, frames: Preprocessing, tile: int) -> dict[str, Any]:
    """The fields of a VisualGeometry that say how images become one tile, and frames."""
    aspect, fit = name_fit(images.fit, tile)
    frame_aspect, frame_fit = name_fit(frames.fit, tile)
    return {
        "aspect": aspect,
        "fit": fit,
        "filter": images.filter,
        "convert_rgb": images.do_convert_rgb,
        "pad_color": pad_color(images.image_mean),
        "frame_aspect": frame_aspect,
        "frame_fit": frame_fit,
        "frame_filter": frames.filter,
    }


def pad_color(mean: Triple) -> tuple[int, int, int]:
    """The uint8 colour a square is padded with: int(mean * 255), not rounded (mm_utils.py)."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


def check_same_values(images: Preprocessing, frames: Preprocessing, settings: Settings) -> None:
    """Raises CheckpointError if frames and images are normalised differently: a model has one normalisation."""
    own, others = frames.values(), images.values()
    if fold_values(**own) == fold_values(**others):
        return
    for field in own:
        if own[field] != others[field]:
            raise CheckpointError(
                f"{settings.where}: {field} is {own[field]!r} for videos, and {others[field]!r} for images: "
                "a model has one normalisation here, so make them equal"
            )


def _triple(value: float | list[float] | Triple) -> Triple:
    if isinstance(value, (int, float)):
        return (float(value),) * 3
    red, green, blue = value
    return red, green, blue
