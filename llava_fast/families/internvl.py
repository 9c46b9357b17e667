"""InternVL in transformers (internvl): InternViT, pixel shuffle, a grid of tiles, `<img>` and `</img>` around an image.

transformers' processor cuts every image into tiles, regardless of crop_to_patches in its file, and adds a thumbnail if
there are several; min_patches and max_patches have an effect. Videos, which have one line per frame, are not supported.

Sources: transformers 5.24 configuration_internvl.py, processing_internvl.py,
models/got_ocr2/image_processing_pil_got_ocr2.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.llava import Llava
from llava_fast.families.llava_names import HF5_DECODER, HF_DECODER
from llava_fast.families.names import NameMap
from llava_fast.families.parts import require, token_id, tower_preprocessing
from llava_fast.families.preprocessing import (
    Kind,
    check_anyres,
    image_kind,
    image_settings,
    read_preprocessing,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing, standard_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.grid import GridTiling
from llava_fast.inputs.tiling.rows import UNKNOWN_TOKEN
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.pixel_shuffle import PixelShuffleConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.internvit import InternVitFields
from llava_fast.ops.activations import ACTIVATIONS
from llava_fast.storage.bounds import Positive
from llava_fast.storage.files import Fields, check_fields

_TILES = Annotated[int, Field(ge=1, le=1024)]


class InternVlFields(fields.HfConfig):
    """config.json."""

    vision_config: InternVitFields | None = None  # type: ignore[assignment]  # another tower's fields
    vision_feature_layer: fields.Layer | None = None
    downsample_ratio: Positive | None = None


class TilesFields(Fields):
    """Fields of the image processor's file that other image processors lack."""

    crop_to_patches: bool | None = None
    min_patches: _TILES | None = None
    max_patches: _TILES | None = None


class InternVl(Llava):
    """InternVL 2.5, 3 and 3.5 in transformers' own layout."""

    model_types = ("internvl",)
    system = "InternVL 2.5, 3, 3.5"
    names = NameMap(
        {
            "hf": (
                *HF_DECODER,
                ("vision_tower.", "vision_tower."),
                ("projector.", "multi_modal_projector."),
            ),
            "hf5": (
                *HF5_DECODER,
                ("vision_tower.", "model.vision_tower."),
                ("projector.", "model.multi_modal_projector."),
            ),
        }
    )
    architecture = "InternVLForConditionalGeneration"
    config_fields = InternVlFields
    image_kinds = (Kind("GotOcr2ImageProcessor", crops=False, own_fields=frozenset(TilesFields.model_fields)),)
    visual_tokens = ("<IMG_CONTEXT>",)
    other = Family.other

    def preprocessing(self, hf: Any, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
        tile, settings = _side(hf.vision_config.image_size), image_settings(path)
        kind = image_kind(settings, self.image_kinds)
        check_fields(settings.content, TilesFields, Path(settings.where))
        check_anyres(settings, kind, tile)
        images = dataclasses.replace(read_preprocessing(settings, kind, tile), fit=standard_fit("squash", tile))
        return images, images

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        return PixelShuffleConfig(
            vision.feature_size,
            out_features,
            _scale(hf, file),
            require(hf.projector_hidden_act, tuple(ACTIVATIONS), "projector_hidden_act", file),
        )

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        connector = config.projector
        if not isinstance(connector, PixelShuffleConfig):
            raise CheckpointError(f"transformers' InternVL has a pixel shuffle as its connector, not {connector}")
        return {"projector_hidden_act": connector.activation, "downsample_ratio": 1 / connector.scale}

    def tiling(self, hf: Any, file: Path) -> dict[str, Any]:
        require(hf.vision_feature_select_strategy, ("default",), "vision_feature_select_strategy", file)
        tile, patch = _side(hf.vision_config.image_size), _side(hf.vision_config.patch_size) * _scale(hf, file)
        if tile % patch:
            raise CheckpointError(f"{file}: a tile of {tile} pixels has no square blocks of patches of {patch} pixels")
        settings = image_settings(file.parent)
        least, most = settings.get("min_patches", 1), settings.get("max_patches", 12)
        unknown = (UNKNOWN_TOKEN,)
        return {"patch_size": patch, "dropped_rows": 0, "tiling": GridTiling(least, most, True, unknown, unknown)}

    def geometry(self, config: LlavaConfig, tokenizer: Any) -> VisualGeometry:
        around: dict[str, Any] = {}
        for field, end in (("before", "start"), ("after", "end")):
            token = getattr(tokenizer, f"{end}_image_token", {"start": "<img>", "end": "</img>"}[end])
            around[field] = (token_id(tokenizer, token, config),)
        tiling = config.geometry.tiling
        assert isinstance(tiling, GridTiling)  # as `tiling` makes it
        return dataclasses.replace(config.geometry, tiling=dataclasses.replace(tiling, **around))

    def token_counts(self, hf: Any, vision: TowerConfig) -> dict[str, Any]:
        return {"image_seq_length": int(vision.patches_per_tile * hf.downsample_ratio**2)}

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        made = super().write(config, tokens)
        return made | {"image_token_id": made.pop("image_token_index")}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        geometry = config.geometry
        assert isinstance(geometry.tiling, GridTiling)
        images = tower_preprocessing(config.vision, "squash", None, geometry.filter, geometry.convert_rgb)
        tiles = {"crop_to_patches": True, "min_patches": geometry.tiling.least, "max_patches": geometry.tiling.most}
        counts = {"image_seq_length": geometry.rows_per_tile, "processor_class": "InternVLProcessor"}
        return {
            "preprocessor_config.json": written(images, geometry.tile_size, self.image_kinds[0]) | tiles,
            "processor_config.json": counts,
        }


def _side(given: Any) -> int:
    """The side of a square in pixels. (Reading the tower raises for other shapes.)"""
    return given if isinstance(given, int) else given[0]


def _scale(hf: Any, file: Path) -> int:
    """Rows along the side of a block that becomes one row."""
    scale = round(1 / hf.downsample_ratio)
    if abs(scale * hf.downsample_ratio - 1) > 1e-6:
        raise CheckpointError(f"{file}: downsample_ratio is {hf.downsample_ratio}; supported are 1, 1/2, 1/3 and so on")
    return scale
