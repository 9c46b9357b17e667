"""LLaVA 1.5 in transformers, and what its other LLaVAs share with it.

Configs on disk are sparse (llava-hf lists only what differs from the defaults), so the text and vision parts
go through `transformers.AutoConfig`, which also turns 4.x fields (rope_scaling, rope_theta) into 5.x ones.

Sources: transformers 5.23 configuration_llava.py, the image processor beside it, and convert_llava_weights_to_hf.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.llava_names import LLAVA_NAMES
from llava_fast.families.names import NameMap
from llava_fast.families.native_sizes import native_preprocessing, native_processor, native_tiling
from llava_fast.families.parts import (
    auto_config,
    decoder_config,
    eos_field,
    eos_token_ids,
    first,
    refuse_quantised,
    require,
    tower_config,
    tower_fields,
    tower_preprocessing,
)
from llava_fast.families.preprocessing import (
    CLIP_KIND,
    SIGLIP_KIND,
    Kind,
    geometry_fields,
    image_kind,
    image_settings,
    read_preprocessing,
    tower_fit,
    written,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing, name_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.config import LlavaConfig, VisualConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.files import check_fields, read_json_if_there

_PROJECTOR_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")


class Llava(Family):
    """LLaVA 1.5: an image is one tile.

    architecture  transformers' class.
    processor     its processor, if its name differs.
    config_fields  what config.json is checked against.
    image_kinds   the supported image processors, the default first.
    has_newline   whether a learned row ends each row of an image's grid of tiles.
    takes_native_sizes  whether its tower may read images at their own sizes.
    """

    model_types = ("llava",)
    system = "LLaVA 1.5"
    names: ClassVar[NameMap] = LLAVA_NAMES
    architecture: ClassVar[str] = "LlavaForConditionalGeneration"
    processor: ClassVar[str] = ""
    config_fields: ClassVar[type[fields.HfConfig]] = fields.HfConfig
    image_kinds: ClassVar[tuple[Kind, ...]] = (Kind("LlavaImageProcessor", squares=True), CLIP_KIND, SIGLIP_KIND)
    has_newline: ClassVar[bool] = False
    takes_native_sizes: ClassVar[bool] = True

    def other(self, config: LlavaConfig) -> str:
        return "llava_llama"

    def read(self, source: dict[str, Any], path: Path) -> LlavaConfig:
        file = path / "config.json"
        check_fields(source, self.config_fields, file)
        refuse_quantised(source, file)
        hf = self.transformers_config(source, file)
        text, visual = hf.text_config, self.visual(hf, path)
        decoder = decoder_config(text, file, tied=bool(hf.tie_word_embeddings))
        if hf.image_token_id is None:
            raise CheckpointError(f"{file}: image_token_id is null; give the id of the tokenizer's <image>")
        generation = read_json_if_there(path / "generation_config.json", fields.Generation)
        return LlavaConfig(
            **vars(visual),
            decoder=decoder,
            layout="hf",
            model_type=source["model_type"],
            image_token_id=hf.image_token_id,
            video_token_id=getattr(hf, "video_token_id", None),
            eos_token_ids=eos_token_ids(generation, source.get("eos_token_id"), text.eos_token_id),
            pad_token_id=first(generation.get("pad_token_id"), source.get("pad_token_id"), text.pad_token_id),
            source=source,
        )

    def visual(self, hf: Any, path: Path) -> VisualConfig:
        """Tower, connector and geometry from a transformers config and the processor files of a directory. Its decoder
        may be any. Raises CheckpointError as `read` does."""
        file, tower, layers = path / "config.json", hf.vision_config, hf.vision_feature_layer
        feature_layers = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
        keeps_all = hf.vision_feature_select_strategy == "full"
        kind = TOWERS[require(tower.model_type, tuple(TOWERS), "vision_config.model_type", file)]
        if kind.native_sizes and not self.takes_native_sizes:
            raise CheckpointError(
                f"{file}: a {self.model_types[0]} cuts images into tiles of one size, and a {tower.model_type} reads "
                "them at their own sizes: it is supported for model_type llava"
            )
        if not kind.leading_rows and not keeps_all:
            raise CheckpointError(
                f"{file}: vision_feature_select_strategy 'default' drops a class row, and a tower like SigLIP has none:"
                " set it to 'full'"
            )
        images, frames = self.preprocessing(hf, kind, path)
        described = tower_config(
            tower,
            file,
            feature_layers=feature_layers,
            keep_class_row=keeps_all and kind.leading_rows > 0,
            **images.values(),
        )
        vision = self.tower(described, file)
        _check_counts(self.token_counts(hf, vision), path / "processor_config.json")
        return VisualConfig(
            vision=vision,
            projector=self.connector(hf, vision, hf.text_config.hidden_size, file),
            geometry=self._geometry(hf, vision, images, frames, file),
            has_newline=self.has_newline,
        )

    def transformers_config(self, source: dict[str, Any], file: Path) -> Any:
        """config.json as transformers reads it."""
        return auto_config(source, file)

    def tower(self, vision: TowerConfig, file: Path) -> TowerConfig:
        """The tower, from `vision`, the one that vision_config describes."""
        return vision

    def connector(self, hf: Any, vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        """The connector that a transformers config describes."""
        return ProjectorConfig(
            kind="mlp",
            in_features=vision.feature_size,
            out_features=out_features,
            activation=require(hf.projector_hidden_act, _PROJECTOR_ACTIVATIONS, "projector_hidden_act", file),
            bias=hf.multimodal_projector_bias,
        )

    def connector_fields(self, config: LlavaConfig) -> dict[str, Any]:
        """The inverse of `connector`. Raises CheckpointError for another kind."""
        projector = config.projector
        if not isinstance(projector, ProjectorConfig):
            raise CheckpointError(f"transformers' LLaVA has a projector of two Linears, not {projector}")
        if projector.kind != "mlp" or projector.depth != 2:
            raise CheckpointError(
                f"transformers' LLaVA has a projector of two Linears, not {projector.kind!r} of depth "
                f"{projector.depth}; save with layout='original'"
            )
        return {"projector_hidden_act": projector.activation, "multimodal_projector_bias": projector.bias}

    def preprocessing(self, hf: Any, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
        """Preprocessing of images and of video frames. LLaVA-1.5 and NeXT have no videos in transformers: their frames
        are processed like images by the tower's own processor.
        """
        settings, tile = image_settings(path), tower.tile_side(hf.vision_config)
        if tower.native_sizes:
            images = native_preprocessing(settings, tile)
            return images, images
        images = read_preprocessing(settings, image_kind(settings, self.image_kinds), tile)
        fit = dataclasses.replace(images.fit, square=False)
        own = images.fit.square and name_fit(images.fit, tile)[1] is None
        return images, dataclasses.replace(images, fit=tower_fit(tower, tile) if own else fit)

    def tiling(self, hf: Any, file: Path) -> dict[str, Any]:
        """The fields of a VisualGeometry that say how images are cut, from a transformers config. Raises
        CheckpointError."""
        if TOWERS[hf.vision_config.model_type].native_sizes:
            return {"tiling": native_tiling(image_settings(file.parent))}
        return {}

    def pooling(self, hf: Any, file: Path) -> dict[str, Any]:
        """Those that say how videos are pooled. Raises CheckpointError."""
        return {}

    def tiling_fields(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        """The inverse of `tiling`, and other fields that only some families have."""
        return {} if config.vision.native_sizes else {"image_seq_length": config.geometry.rows_per_tile}

    def token_counts(self, hf: Any, vision: TowerConfig) -> dict[str, Any]:
        """The fields of processor_config.json by which transformers counts tokens."""
        return {
            "vision_feature_select_strategy": hf.vision_feature_select_strategy,
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(vision.has_class_row),
        }

    def _geometry(
        self, hf: Any, vision: TowerConfig, images: Preprocessing, frames: Preprocessing, file: Path
    ) -> VisualGeometry:
        common = {
            "tile_size": vision.image_size,
            "patch_size": vision.patch_size,
            "compat": "hf",
            "class_rows": int(vision.keep_class_row),
            "dropped_rows": int(vision.drops_class_row),
            **geometry_fields(images, frames, vision.image_size),
        }
        try:
            tiling = self.tiling(hf, file) | self.pooling(hf, file)
            return VisualGeometry(**(common | tiling))
        except ImageError as problem:
            raise CheckpointError(f"{file}: {problem}") from problem

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        connector, vision, layers = self.connector_fields(config), config.vision, config.vision.feature_layers
        text = dataclasses.replace(config.decoder, vocab_size=tokens.vocab_size).to_hf5()
        ids = {"bos_token_id": config.source.get("bos_token_id"), "pad_token_id": config.pad_token_id}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            "image_token_index": tokens.image,
            **connector,
            "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
            "vision_feature_select_strategy": _select_strategy(vision),
            "pad_token_id": config.pad_token_id,
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "text_config": {"model_type": config.decoder.family, **text, **ids, "eos_token_id": eos_field(config)},
            "vision_config": tower_fields(vision),
            **self.tiling_fields(config, tokens),
        }

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        return {
            "preprocessor_config.json": self.image_processor(config),
            "processor_config.json": {
                "vision_feature_select_strategy": _select_strategy(config.vision),
                "image_token": "<image>",
                "processor_class": self.processor
                or f"{self.architecture.removesuffix('ForConditionalGeneration')}Processor",
                **self.processor_counts(config),
            },
        }

    def image_processor(self, config: LlavaConfig) -> dict[str, Any]:
        geometry, kind = config.geometry, self.image_kinds[0]
        if config.vision.native_sizes:
            return native_processor(config)
        if geometry.aspect == "squash" and config.vision.own_aspect == "squash":
            kind = SIGLIP_KIND
        images = tower_preprocessing(
            config.vision, geometry.aspect, geometry.fit, geometry.filter, geometry.convert_rgb
        )
        return written(images, geometry.tile_size, kind)

    def processor_counts(self, config: LlavaConfig) -> dict[str, Any]:
        """`token_counts` in the form that is written, without the strategy."""
        vision = config.vision
        return {"patch_size": vision.patch_size, "num_additional_image_tokens": int(vision.has_class_row)}


def _check_counts(expected: dict[str, Any], file: Path) -> None:
    """Raises CheckpointError if token counts of processor_config.json and config.json differ; config.json counts here,
    transformers uses both, and fails.
    """
    given = read_json_if_there(file, fields.Processor)
    for field, value in expected.items():
        if given.get(field) not in (None, value):
            raise CheckpointError(
                f"{file}: {field} is {given[field]!r}, but config.json implies {value!r}: correct one of them"
            )


def _select_strategy(vision: TowerConfig) -> str:
    return "full" if vision.keep_class_row or not vision.has_class_row else "default"
