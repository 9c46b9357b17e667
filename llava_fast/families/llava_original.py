"""The original LLaVA (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT): config.json is a decoder's, with `mm_*` fields.

The vision tower is only named; see known_towers.py. There is no image token: prompts are tokenised in the pieces
between `<image>` placeholders, so image_token_id is the original's own placeholder -200 (llava/constants.py).

Sources: haotian-liu/LLaVA c121f04 and LLaVA-VL/LLaVA-NeXT df17966: llava_arch.py, mm_utils.py,
multimodal_encoder/{builder,clip_encoder,siglip_encoder}.py, multimodal_projector/builder.py; 01-ai/Yi VL/ for
`mlp2x_gelu_Norm`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.known_towers import KNOWN_TOWERS, Tower, find_tower
from llava_fast.families.llava_names import LLAVA_NAMES
from llava_fast.families.names import NameMap
from llava_fast.families.native_sizes import NATIVE_ASPECT, native_processor
from llava_fast.families.original_tiling import check_anyres, read_geometry, video_fields
from llava_fast.families.parts import (
    check_feature_layers,
    decoder_config,
    eos_field,
    eos_token_ids,
    refuse_quantised,
    require,
    tower_fields,
    tower_preprocessing,
)
from llava_fast.families.preprocessing import tower_fit, tower_kind, written
from llava_fast.inputs.pictures.preprocessing import Preprocessing, name_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.decoders import DECODERS
from llava_fast.models.router import RouterConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.vit import SiglipConfig
from llava_fast.storage.files import check_fields, one_line, read_json_if_there
from llava_fast.storage.hub import local_directory
from llava_fast.storage.tensor_files import StoredTensor

IMAGE_TOKEN_ID = -200
_PROJECTORS = {"linear": ("linear", 1), "identity": ("identity", 0), "mlp2x_gelu_Norm": ("yi", 2)}
"""mm_projector_type -> kind and depth, beside mlpNx_gelu."""


class LlavaOriginal(Family):
    """Any original LLaVA.

    own_type  the family's type here, if config.json identifies it only by mm_projector_type.
    config_fields  the schema of config.json.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_llama", "llava_mistral", "llava_qwen")
    system = "LLaVA, 1.5, 1.5-HD, NeXT, NeXT-Video, Yi-VL as their own code writes them"
    reference = "transformers, by way of conversion"
    layout = "original"
    own_type: ClassVar[str] = ""
    config_fields: ClassVar[type[fields.OriginalConfig]] = fields.OriginalConfig
    names: ClassVar[NameMap] = LLAVA_NAMES
    adapter_spelling = "original"
    adapters_see_tower = False  # the original's trainer adds it after PEFT's layers

    def other(self, config: LlavaConfig) -> str:
        """Which of transformers' four LLaVA classes treats images as this config does.

        transformers has only two kinds of video pooling: before the projector (llava_next_video), or bilinear after it
        (llava_onevision). Another kind becomes llava_next, which does not support videos.
        """
        geometry = config.geometry
        if geometry.merge == "flat" and geometry.aspect in ("crop", "pad", "squash"):
            return "llava"
        if geometry.merge == "spatial_unpad" and geometry.aspect == "anyres":
            if geometry.max_tiles is not None:
                return "llava_onevision"
            pools_first = geometry.video_pool in ("average", "max") and geometry.video_pool_stage == "before"
            return "llava_next_video" if pools_first else "llava_next"
        raise CheckpointError(
            f"transformers has no LLaVA with image_aspect_ratio {geometry.aspect!r} and mm_patch_merge_type "
            f"{geometry.merge!r}; save with layout='original'"
        )

    def read(self, source: dict[str, Any], path: Path) -> LlavaConfig:
        return self.read_with_tower(source, path)[0]

    def read_with_tower(
        self, source: dict[str, Any], path: Path, vision_tower: str | Path | None = None, base: Path | None = None
    ) -> tuple[LlavaConfig, Tower]:
        """As in Family. The tower is looked for inside `base` too, if that is a whole LLaVA that holds it."""
        file = path / "config.json"
        check_fields(source, self.config_fields, file)
        model_type = require(source.get("model_type"), tuple(_decoders()), "model_type", file)
        refuse_quantised(source, file)
        if source.get("s2"):
            raise CheckpointError(f"{file}: s2 (multi-scale towers) is not supported")
        if not source.get("mm_vision_tower"):
            raise CheckpointError(f"{file} has no mm_vision_tower, so it is a language model, not a LLaVA")
        text = text_config(source, file)
        decoder = decoder_config(text, file, tied=bool(text.tie_word_embeddings))
        inside = local_directory(base / source["mm_vision_tower"]) if base is not None else None
        tower = find_tower(source["mm_vision_tower"], path, vision_tower or inside)
        vision = self.tower(_select_features(tower.config, source, file), file)
        generation = read_json_if_there(path / "generation_config.json", fields.Generation)
        merge = source.get("mm_patch_merge_type", "flat")
        return LlavaConfig(
            vision=vision,
            projector=self.connector(source, vision, decoder.hidden_size, file),
            decoder=decoder,
            geometry=self.tiles(source, vision, tower, merge, file),
            layout="original",
            model_type=self.own_type or model_type,
            image_token_id=IMAGE_TOKEN_ID,
            has_newline="unpad" in merge,
            router=self.router(source, file),
            eos_token_ids=eos_token_ids(generation, source.get("eos_token_id")),
            pad_token_id=generation.get("pad_token_id", source.get("pad_token_id")),
            source=source,
            tower_processor=dict(tower.settings.content),
        ), tower

    def tower(self, vision: TowerConfig, file: Path) -> TowerConfig:
        """The tower, of which `vision` is what its repository describes."""
        return vision

    def connector(self, source: dict[str, Any], vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
        """The connector that config.json describes."""
        return _projector(source, vision.feature_size, out_features, file)

    def router(self, source: dict[str, Any], file: Path) -> RouterConfig | None:
        """What leaves out rows of an image, or None."""
        return None

    def tiles(
        self, source: dict[str, Any], vision: TowerConfig, tower: Tower, merge: str, file: Path
    ) -> VisualGeometry:
        """How images become tiles and rows, from config.json and the tower's image processor."""
        return read_geometry(source, vision, tower, merge, file)

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        if (model_type := config.decoder.original_type) is None:
            raise CheckpointError(
                f"the original layout has no {config.decoder.family!r} decoder, only {', '.join(original_types())}; "
                "save with layout='hf'"
            )
        vision, geometry = config.vision, config.geometry
        if len(vision.feature_layers) > 1 or (isinstance(vision, SiglipConfig) and vision.feature_layers != (-1,)):
            raise CheckpointError(
                f"the original layout reads one hidden state of CLIP or the last of SigLIP, not {vision.feature_layers}"
            )
        projector = config.projector
        if not isinstance(projector, ProjectorConfig) or (
            (projector.kind, projector.activation, projector.bias) != ("mlp", "gelu", True)
        ):
            raise CheckpointError(f"the original layout has no projector like {projector}")
        if geometry.aspect in ("anyres", "highres"):
            ratio = geometry.aspect if geometry.max_tiles is None else f"anyres_max_{geometry.max_tiles}"
            check_anyres(config)
        else:
            ratio = NATIVE_ASPECT if vision.native_sizes else "pad" if geometry.aspect == "pad" else "square"
        return {
            "architectures": [_architecture(model_type)],
            "model_type": model_type,
            **config.decoder.to_hf(),
            "bos_token_id": config.source.get("text_config", {}).get("bos_token_id"),
            "eos_token_id": eos_field(config),
            "pad_token_id": config.pad_token_id,
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "use_mm_proj": True,
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": f"mlp{projector.depth}x_gelu",
            "mm_vision_tower": _tower_name(config)[0],
            "mm_vision_select_layer": -2 if isinstance(vision, SiglipConfig) else vision.feature_layers[0],
            "mm_vision_select_feature": "cls_patch" if vision.keep_class_row else "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "mm_patch_merge_type": geometry.merge,
            "image_aspect_ratio": ratio,
            "image_grid_pinpoints": [[width, height] for height, width in geometry.canvases] or None,
            "unfreeze_mm_vision_tower": True,  # tells the original loader that the checkpoint has the tower's weights
            **video_fields(config),
        }

    def unchanged(self, config: LlavaConfig) -> dict[str, Any]:
        """The weights now include the tower; the last field tells the original loader so."""
        return config.source | {"mm_vision_tower": _tower_name(config)[0], "unfreeze_mm_vision_tower": True}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        """The tower's own repository, unless it is a known one."""
        if (folder := _tower_name(config)[1]) is None:
            return {}
        return {
            f"{folder}/config.json": tower_fields(own_tower(config.vision)),
            f"{folder}/preprocessor_config.json": config.tower_processor or _tower_processor(config),
        }

    def assembled_fields(self, decoder: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that turn a language model's config.json into this family's: `decoder` is its kind, and `parts`
        the fields of a recipe's Assembly. Raises CheckpointError.
        """
        return assembled_fields(decoder, parts)

    def given_parts(self, parts: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """Tensors of the connector from the files that an Assembly names, by our names. Raises CheckpointError."""
        return {}

    def adapted_model(self, config: LlavaConfig, file: Path) -> nn.Module:
        """The language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(text_config(config.source, file))


def original_types() -> dict[str, str]:
    """The decoders that an original LLaVA may have, by their names in transformers, and its model_type with each."""
    types = {kind: DECODERS[kind].original_type for kind in DECODERS}
    return {kind: named for kind, named in types.items() if named is not None}


def _decoders() -> dict[str, str]:
    """The inverse: model_type to the decoder's name in transformers. The first LLaVA's model_type was llava."""
    return {"llava": "llama"} | {named: kind for kind, named in original_types().items()}


def _architecture(model_type: str) -> str:
    """llava_qwen -> LlavaQwenForCausalLM."""
    return "".join(part.capitalize() for part in model_type.split("_")) + "ForCausalLM"


def assembled_fields(decoder: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """As LlavaOriginal.assembled_fields."""
    pinpoints = parts["pinpoints"]
    if isinstance(pinpoints, list):
        pinpoints = [list(pair) for pair in pinpoints]  # as JSON has them
    model_type = original_types()[decoder]
    given: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [_architecture(model_type)],
        "use_mm_proj": True,
        "mm_projector_type": parts["projector"],
        "mm_vision_tower": parts["vision_tower"],
        "mm_vision_select_layer": parts["feature_layer"],
        "mm_vision_select_feature": parts["feature"],
        "mm_patch_merge_type": parts["merge"],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": parts["aspect"],
        "image_grid_pinpoints": pinpoints,
        "mm_newline_position": parts["video_newline"],
    }
    if parts["video_pool_stride"] is not None:
        given["mm_spatial_pool_mode"] = parts["video_pool"]
        given["mm_spatial_pool_stride"] = parts["video_pool_stride"]
        if parts["video_pool_stage"] == "before":
            given["mm_resampler_type"] = "spatial_pool"
    return given | parts["settings"]


def text_config(source: Mapping[str, Any], file: Path) -> Any:
    """The decoder of an original config.json as transformers reads it; CheckpointError if it cannot."""
    from transformers import CONFIG_MAPPING  # seconds to import, as in parts.py

    decoders = _decoders()
    family = decoders[require(source.get("model_type"), tuple(decoders), "model_type", file)]
    known = fields.Decoder.model_fields.keys() - {"model_type"}
    try:
        given = {field: value for field, value in source.items() if field in known}
        return CONFIG_MAPPING[family](**copy.deepcopy(given))  # transformers adds to a nested rope_scaling
    except Exception as problem:  # transformers' validators raise many unrelated types
        raise CheckpointError(f"{file} describes no {family} decoder: {one_line(problem)}") from problem


def _select_features(tower: TowerConfig, source: dict[str, Any], file: Path) -> TowerConfig:
    """The tower with the hidden state that the projector reads."""
    if isinstance(tower, SiglipConfig):
        # SigLipVisionTower deletes its last layer and uses the last hidden state of the rest; it ignores
        # mm_vision_select_layer.
        if tower.num_layers < 2:
            raise CheckpointError(
                f"{file}: the original drops the last layer of a SigLIP tower, but this one has only one layer"
            )
        return dataclasses.replace(tower, num_layers=tower.num_layers - 1, feature_layers=(-1,))
    feature = source.get("mm_vision_select_feature", "patch")
    selected = dataclasses.replace(
        tower,
        feature_layers=(source.get("mm_vision_select_layer", -2),),
        keep_class_row=require(feature, ("patch", "cls_patch"), "mm_vision_select_feature", file) == "cls_patch",
    )
    check_feature_layers(selected, file)
    return selected


def _projector(source: dict[str, Any], in_features: int, out_features: int, file: Path) -> ProjectorConfig:
    kind = source.get("mm_projector_type", "linear")
    sizes: dict[str, Any] = {"in_features": in_features, "out_features": out_features}
    if match := re.fullmatch(r"mlp(\d{1,2})x_gelu", kind):
        return ProjectorConfig(kind="mlp", depth=int(match[1]), **sizes)
    if kind not in _PROJECTORS:
        raise CheckpointError(
            f"{file}: mm_projector_type is {kind!r}; supported are mlpNx_gelu, {', '.join(_PROJECTORS)}"
        )
    name, depth = _PROJECTORS[kind]
    return ProjectorConfig(kind=name, depth=depth, **sizes)


def _tower_name(config: LlavaConfig) -> tuple[str, str | None]:
    """(mm_vision_tower, folder inside the checkpoint that describes the tower, None for a known one)."""
    name = config.source.get("mm_vision_tower")
    known = known_tower_name(config.vision) if _has_plain_processor(config) else None
    if known is not None and (name is None or Path(name).name == Path(known).name):
        return name or known, None
    if name is None or Path(name).is_absolute() or ".." in Path(name).parts:
        name = f"{config.vision.kind}_vision_tower"
    return name, name


def _tower_processor(config: LlavaConfig) -> dict[str, Any]:
    """preprocessor_config.json of a tower's own repository."""
    geometry, vision = config.geometry, config.vision
    if vision.native_sizes:
        return native_processor(config)
    frames = tower_preprocessing(vision, geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter)
    return written(frames, geometry.tile_size, tower_kind(vision))


def _has_plain_processor(config: LlavaConfig) -> bool:
    """Whether a tower's processor in this checkpoint equals the default of its kind."""
    plain = Preprocessing(tower_fit(config.vision, config.geometry.tile_size))
    frames = config.geometry.frame_filter, config.geometry.frame_fit, config.geometry.frame_aspect
    return frames == (plain.filter, None, name_fit(plain.fit, config.geometry.tile_size)[0])


def own_tower(vision: TowerConfig) -> TowerConfig:
    """The tower as its own repository has it: original LLaVA deletes SigLIP's last layer, and picks features."""
    layers = vision.num_layers + (isinstance(vision, SiglipConfig))
    return dataclasses.replace(vision, num_layers=layers, feature_layers=(-2,), keep_class_row=False)


def known_tower_name(vision: TowerConfig) -> str | None:
    """The Hub repository that has exactly this tower, if it is one of the known ones."""
    return next((name for name, known in KNOWN_TOWERS.items() if known == own_tower(vision)), None)
