"""Idefics3 and SmolVLM in transformers (idefics3, smolvlm): tiles named by row and column, pixel shuffle.

Tokens around tiles are what the tokenizer makes of transformers' text for them: some tokenizers have a token for
`<row_1_col_1>` or for two newlines, others spell it out. Videos, whose frames have times in the prompt, are not
supported.

Sources: transformers 5.24 configuration_idefics3.py, processing_idefics3.py, processing_smolvlm.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.llava import Llava
from llava_fast.families.names import NameMap, within
from llava_fast.families.parts import first, token_id, tower_preprocessing
from llava_fast.families.preprocessing import (
    Kind,
    Settings,
    image_kind,
    image_settings,
    read_preprocessing,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing, standard_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.split import SplitTiling
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.shuffle_linear import ShuffleLinearConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.files import Fields, check_fields

_TOWERS = ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision")
"""Names of the tower in published files. transformers uses the model's own in any case."""
_MOST_ALONG_SIDE = 32
_NAMES = (
    ("decoder.lm_head.", "lm_head."),
    ("decoder.", "model.text_model."),
    ("vision_tower.", "model.vision_model."),
    *within(ShuffleLinearConfig.hf_names, "projector.", "model.connector."),
)


class Idefics3Fields(fields.HfConfig):
    """config.json."""

    scale_factor: Annotated[int, Field(ge=1, le=1024)] | None = None


class SplitFields(Fields):
    """Fields of the image processor's file that other image processors lack."""

    do_image_splitting: bool | None = None
    max_image_size: dict[str, fields.Side | None] | None = None
    return_row_col_info: Any = None
    video_sampling: Any = None


def _kind(name: str) -> Kind:
    half = (0.5, 0.5, 0.5)
    return Kind(name, False, False, half, half, "lanczos", frozenset(SplitFields.model_fields))


class Idefics3(Llava):
    """Idefics3 and the first SmolVLM."""

    model_types = ("idefics3",)
    system = "Idefics3, SmolVLM"
    names = NameMap({"hf": _NAMES, "hf5": _NAMES})
    architecture = "Idefics3ForConditionalGeneration"
    processor = "Idefics3Processor"
    config_fields = Idefics3Fields
    image_kinds: ClassVar[tuple[Kind, ...]] = (_kind("Idefics3ImageProcessor"),)
    other = Family.other

    def read(self, source: dict[str, Any], path: Path) -> LlavaConfig:
        """The padding token is text_config's. Elsewhere files have Idefics3-8B's, also beside smaller vocabularies."""
        config = super().read(source, path)
        pad = first((source.get("text_config") or {}).get("pad_token_id"), config.pad_token_id)
        known = pad is not None and pad < config.decoder.vocab_size
        return dataclasses.replace(config, pad_token_id=pad if known else None)

    def transformers_config(self, source: dict[str, Any], file: Path) -> Any:
        vision = dict(source.get("vision_config") or {})
        if vision.get("model_type") in _TOWERS:
            del vision["model_type"]
        hf = super().transformers_config(source | {"vision_config": vision}, file)
        hf.vision_feature_layer, hf.vision_feature_select_strategy = -1, "full"
        return hf

    def preprocessing(self, hf: Any, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
        tile, settings = hf.vision_config.image_size, image_settings(path)
        kind = image_kind(settings, self.image_kinds)
        check_fields(settings.content, SplitFields, Path(settings.where))
        if not settings.get("do_resize", True):
            settings.refuse("do_resize", "only true is supported")
        if _edge(settings, "max_image_size", 364) != tile:
            settings.refuse("max_image_size", f"supported is the side of the vision tower's tiles, {tile}")
        square = Settings({**settings.content, "size": {"height": tile, "width": tile}}, settings.where)
        images = dataclasses.replace(read_preprocessing(square, kind, tile), fit=standard_fit("squash", tile))
        return images, images

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        return ShuffleLinearConfig(vision.feature_size, out_features, hf.scale_factor)

    def tiling(self, hf: Any, file: Path) -> dict[str, Any]:
        tile, patch, scale = hf.vision_config.image_size, hf.vision_config.patch_size, hf.scale_factor
        if tile // patch % scale:
            raise CheckpointError(
                f"{file}: scale_factor is {scale}, which does not divide a tile's side of {tile // patch} patches"
            )
        settings = image_settings(file.parent)
        tiling = SplitTiling(_edge(settings, "size", 4 * 364), settings.get("do_image_splitting", True))
        if tiling.split and tiling.most_along_side(tile) > _MOST_ALONG_SIDE:
            settings.refuse("size", f"it makes more than {_MOST_ALONG_SIDE} tiles of {tile} pixels along a side")
        return {"patch_size": patch * scale, "tiling": tiling}

    def geometry(self, config: LlavaConfig, tokenizer: Any) -> VisualGeometry:
        tiling = config.geometry.tiling
        assert isinstance(tiling, SplitTiling)  # as `tiling` makes it
        fake = self._token(tokenizer, "fake_image_token", "<fake_token_around_image>")
        whole = self._token(tokenizer, "global_image_token", "<global-img>")
        image = tokenizer.convert_ids_to_tokens(config.image_token_id)
        edge = (token_id(tokenizer, fake, config),)

        def between(first: str, texts: list[str], last: str) -> list[tuple[int, ...]]:
            """The ids of each text between two tokens."""
            prompts = [first + text + last for text in texts]
            return [tuple(ids[1:-1]) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]

        most = range(1, 1 + tiling.most_along_side(config.geometry.tile_size)) if tiling.split else ()
        places = [between(fake, [f"<row_{row}_col_{column}>" for column in most], image) for row in most]
        line, last_line = between(image, ["\n", "\n\n"], fake)
        filled = dataclasses.replace(
            tiling,
            before_tile=tuple(tuple(edge + ids for ids in row) for row in places),
            line=line,
            last_line=last_line,
            before_whole=edge + between(fake, [whole], image)[0],
            after_whole=edge,
        )
        return dataclasses.replace(config.geometry, tiling=filled)

    def _token(self, tokenizer: Any, name: str, default: str) -> str:
        """A token of the prompt's text; Idefics3's have fixed names."""
        return default

    def token_counts(self, hf: Any, vision: TowerConfig) -> dict[str, Any]:
        return {"image_seq_len": vision.patches_per_tile // hf.scale_factor**2}

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        made = super().write(config, tokens)
        for field in ("vision_feature_layer", "vision_feature_select_strategy", "pad_token_id"):
            del made[field]
        return made | {"image_token_id": made.pop("image_token_index")}

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        connector = config.projector
        if not isinstance(connector, ShuffleLinearConfig):
            raise CheckpointError(f"transformers' Idefics3 has a pixel shuffle and one Linear, not {connector}")
        return {"scale_factor": connector.scale}

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        return {}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        geometry = config.geometry
        assert isinstance(geometry.tiling, SplitTiling)
        images = tower_preprocessing(config.vision, "squash", None, geometry.filter, geometry.convert_rgb)
        made = written(images, geometry.tile_size, self.image_kinds[0])
        del made["do_center_crop"]
        tiles = {
            "size": {"longest_edge": geometry.tiling.longest},
            "max_image_size": {"longest_edge": geometry.tile_size},
            "do_image_splitting": geometry.tiling.split,
            "do_pad": True,
        }
        counts = {"image_seq_len": geometry.rows_per_tile, "processor_class": self.processor}
        return {"preprocessor_config.json": made | tiles, "processor_config.json": counts}


class SmolVlm(Idefics3):
    """SmolVLM2, and the first SmolVLM under its own name."""

    model_types = ("smolvlm",)
    system = "SmolVLM2"
    architecture = "SmolVLMForConditionalGeneration"
    processor = "SmolVLMProcessor"
    image_kinds = (_kind("SmolVLMImageProcessor"), *Idefics3.image_kinds)

    def _token(self, tokenizer: Any, name: str, default: str) -> str:
        return getattr(tokenizer, name, default)


def _edge(settings: Settings, field: str, default: int) -> int:
    """The longest_edge of a size. Raises CheckpointError for another kind of size."""
    given = settings.get(field, {"longest_edge": default})
    stated = {name: value for name, value in given.items() if value} if isinstance(given, dict) else {}
    if set(stated) != {"longest_edge"}:
        settings.refuse(field, 'supported is {"longest_edge": ...}')
    return stated["longest_edge"]
