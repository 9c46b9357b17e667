"""Images of native sizes: the settings of SigLIP 2's image processor, read and written.

Source: transformers 5.17-5.24, models/siglip2/image_processing_{,pil_}siglip2.py.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field

from llava_fast.families.preprocessing import (
    SIGLIP2_KIND,
    Settings,
    geometry_fields,
    image_kind,
    read_preprocessing,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing, standard_fit
from llava_fast.inputs.tiling.anyres import Compat, VisualGeometry
from llava_fast.inputs.tiling.native import NativeTiling
from llava_fast.models.config import LlavaConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.files import Fields, check_fields

NATIVE_ASPECT = "native"
"""image_aspect_ratio in the original layout; defined by this package, since no fork has released such a LLaVA."""
_DEFAULT_PATCHES = 256
_SIZES = {"size", "default_to_square", "do_center_crop", "crop_size", "do_pad", "pad_size"}
"""Fields that this processor ignores: the image and the limit of patches determine its size."""


class NativeProcessor(Fields):
    """The fields of preprocessor_config.json that only this processor has."""

    patch_size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    max_num_patches: Annotated[int, Field(ge=1, le=2**20)] | None = None


def native_preprocessing(settings: Settings, patch: int) -> Preprocessing:
    """The normalisation of a patch's bytes, and how images are resized. Raises CheckpointError for settings of another
    processor, for another patch than the tower's, and for images that are not resized.
    """
    image_kind(settings, (SIGLIP2_KIND,))
    check_fields(settings.content, NativeProcessor, settings.where)
    if settings.get("patch_size") not in (None, patch):
        settings.refuse("patch_size", f"the vision tower reads patches of {patch} pixels: correct it")
    if not settings.get("do_resize", True):
        settings.refuse("do_resize", "an image is resized to whole patches: set it to true")
    read = {name: value for name, value in settings.content.items() if name not in _SIZES}
    images = read_preprocessing(Settings(read, settings.where), SIGLIP2_KIND, patch)
    return dataclasses.replace(images, fit=standard_fit("squash", patch))


def native_tiling(settings: Settings) -> NativeTiling:
    """The tiling rule of these settings."""
    return NativeTiling(settings.get("max_num_patches", _DEFAULT_PATCHES))


def native_geometry(vision: TowerConfig, images: Preprocessing, settings: Settings, compat: Compat) -> VisualGeometry:
    """How images of an original checkpoint become patches."""
    side = vision.image_size
    fields = geometry_fields(images, images, side)
    return VisualGeometry(side, vision.patch_size, compat=compat, tiling=native_tiling(settings), **fields)


def native_processor(config: LlavaConfig) -> dict[str, Any]:
    """preprocessor_config.json of a model whose tower reads native sizes."""
    geometry, vision = config.geometry, config.vision
    assert isinstance(geometry.tiling, NativeTiling)
    values = {name: getattr(vision, name) for name in Preprocessing.VALUES}
    fit = standard_fit("squash", vision.patch_size)
    images = Preprocessing(fit, geometry.filter, do_convert_rgb=geometry.convert_rgb, **values)
    made = written(images, vision.patch_size, SIGLIP2_KIND)
    own = {"patch_size": vision.patch_size, "max_num_patches": geometry.tiling.max_patches}
    return {name: value for name, value in made.items() if name not in ("size", "do_center_crop")} | own
