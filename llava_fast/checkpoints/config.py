"""From a Hugging Face checkpoint's config.json and processor files to a `LlavaConfig`.

Configs on disk are sparse (llava-hf lists only what differs from the defaults), so the text and vision parts
go through `transformers.AutoConfig`, which also turns 4.x fields (rope_scaling, rope_theta) into 5.x ones.

Sources: transformers 5.23 configuration_{llava,llava_next,llava_next_video,llava_onevision}.py and the
image and video processors beside them.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_fast.checkpoints import fields
from llava_fast.checkpoints.files import Fields, check_fields, one_line, read_json, read_json_if_there
from llava_fast.checkpoints.preprocessing import (
    OWN_KINDS,
    VIDEO_KINDS,
    check_anyres,
    check_pinpoints,
    check_same_values,
    geometry_fields,
    image_kind,
    image_settings,
    read_preprocessing,
    tower_fit,
    video_kind,
    video_settings,
)
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.inputs.pictures.preprocessing import Fit, Preprocessing, name_fit, standard_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.decoders import DECODERS
from llava_fast.models.decoders.base import DecoderConfig
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.base import TowerConfig

HF_MODEL_TYPES = ("llava", "llava_next", "llava_next_video", "llava_onevision")
_PROJECTOR_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")


def read_hf_config(path: str | Path) -> LlavaConfig:
    """A `LlavaConfig` from a directory in Hugging Face's layout.

    Raises CheckpointError for anything this package cannot run, naming it and what is supported.
    """
    path, file = Path(path), Path(path) / "config.json"
    source = read_json(file, fields.HfConfig)
    model_type = require(source.get("model_type"), HF_MODEL_TYPES, "model_type", file)
    refuse_quantised(source, file)
    hf = auto_config(source, file)
    text, tower = hf.text_config, hf.vision_config

    layers = hf.vision_feature_layer
    feature_layers = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
    keeps_all = hf.vision_feature_select_strategy == "full"
    kind = TOWERS[require(tower.model_type, tuple(TOWERS), "vision_config.model_type", file)]
    if not kind.leading_rows and not keeps_all:
        raise CheckpointError(
            f"{file}: vision_feature_select_strategy 'default' drops a class row, and a tower like SigLIP has none: "
            "set it to 'full'"
        )
    images, frames = _preprocessing(hf, kind, path)
    vision = tower_config(
        tower,
        file,
        feature_layers=feature_layers,
        keep_class_row=keeps_all and kind.leading_rows > 0,
        **images.values(),
    )
    _check_counts(hf, vision, path)
    projector = ProjectorConfig(
        kind="mlp",
        in_features=vision.feature_size,
        out_features=text.hidden_size,
        activation=require(hf.projector_hidden_act, _PROJECTOR_ACTIVATIONS, "projector_hidden_act", file),
        bias=hf.multimodal_projector_bias,
    )
    decoder = decoder_config(text, file, tied=bool(hf.tie_word_embeddings))
    if hf.image_token_id is None:
        raise CheckpointError(f"{file}: image_token_id is null; give the id of the tokenizer's <image>")
    generation = read_json_if_there(path / "generation_config.json", fields.Generation)
    return LlavaConfig(
        vision=vision,
        projector=projector,
        decoder=decoder,
        geometry=_geometry(hf, vision, images, frames, file),
        layout="hf",
        model_type=model_type,
        image_token_id=hf.image_token_id,
        video_token_id=getattr(hf, "video_token_id", None),
        has_newline=model_type != "llava",
        eos_token_ids=eos_token_ids(generation, source.get("eos_token_id"), text.eos_token_id),
        pad_token_id=_first(generation.get("pad_token_id"), source.get("pad_token_id"), text.pad_token_id),
        source=source,
    )


def tower_config(tower, file: Path, **choices) -> TowerConfig:
    """A TowerConfig from a transformers vision config; `choices` are the fields that it does not have."""
    kind = TOWERS[require(tower.model_type, tuple(TOWERS), "vision_config.model_type", file)]
    _check_whole(tower, fields.Tower, file)
    config = _made(file, kind.from_hf, tower, **choices)
    check_feature_layers(config, file)
    return config


def _made(file: Path, make: Callable[..., Any], *given: Any, **choices: Any) -> Any:
    """make(...), what it refuses as a CheckpointError that names the file."""
    try:
        return make(*given, **choices)
    except ValueError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def check_feature_layers(tower: TowerConfig, file: Path) -> None:
    """Raises CheckpointError for a hidden state that the tower does not have."""
    for layer in tower.feature_layers:
        if not -tower.num_layers - 1 <= layer <= tower.num_layers:
            raise CheckpointError(f"{file}: feature layer {layer} is none of a tower of {tower.num_layers} layers")


def decoder_config(text, file: Path, tied: bool) -> DecoderConfig:
    """A DecoderConfig from a transformers text config."""
    family = DECODERS[require(text.model_type, tuple(DECODERS), "text_config.model_type", file)]
    _check_whole(text, fields.Decoder, file)
    return _made(file, family.from_hf, text, tied)


def _check_whole(config: Any, kind: type[Fields], file: Path) -> None:
    """The bounds of the file's own fields, for what transformers made of them: nothing may be left out."""
    check_fields({name: getattr(config, name, None) for name in kind.model_fields}, kind, file, sparse=False)


def require(value: Any, supported: tuple[str, ...], field: str, file: Path) -> Any:
    """`value` if it is supported, else a CheckpointError that names the field and lists what is."""
    if value not in supported:
        raise CheckpointError(f"{file}: {field} is {value!r}; supported are {', '.join(supported)}")
    return value


def refuse_quantised(source: dict[str, Any], file: Path) -> None:
    if source.get("quantization_config"):
        method = source["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{file}: it is quantised ({method}); load the unquantised checkpoint it was made from")


def eos_token_ids(generation: dict[str, Any], *others: int | list[int] | None) -> tuple[int, ...]:
    """What ends an answer: as generation_config.json says (null: nothing does), else the first of `others` that is
    stated. A number, a list or nothing."""
    stated = generation.get("eos_token_id", _first(*others))
    return () if stated is None else tuple(stated) if isinstance(stated, list) else (stated,)


def auto_config(source: dict[str, Any], file: Path):
    """What transformers makes of the content of a config.json; CheckpointError if it cannot."""
    from transformers import CONFIG_MAPPING  # seconds to import: only a process that loads a checkpoint pays

    kind = source.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{file}: model_type is {kind!r}, which transformers does not know")
    for section, supported in (("text_config", tuple(DECODERS)), ("vision_config", tuple(TOWERS))):
        if (given := (source.get(section) or {}).get("model_type")) is not None:
            require(given, supported, f"{section}.model_type", file)
    try:
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(source))
    except Exception as problem:  # its validators raise a dozen unrelated types
        raise CheckpointError(f"{file}: transformers cannot read it: {one_line(problem)}") from problem


def _check_counts(hf, vision: TowerConfig, path: Path) -> None:
    """Raises CheckpointError where processor_config.json counts tokens otherwise than config.json, by which they are
    counted here; transformers goes by both, and fails."""
    file = path / "processor_config.json"
    given = read_json_if_there(file, fields.Processor)
    expected = {"vision_feature_select_strategy": hf.vision_feature_select_strategy}
    if hf.model_type == "llava_onevision":
        expected |= {"num_image_tokens": vision.patches_per_tile, "vision_aspect_ratio": hf.vision_aspect_ratio}
    else:
        expected |= {"patch_size": vision.patch_size, "num_additional_image_tokens": int(vision.has_class_row)}
    for field, value in expected.items():
        if given.get(field) not in (None, value):
            raise CheckpointError(
                f"{file}: {field} is {given[field]!r}, and by config.json it is {value!r}: correct one"
            )


def _preprocessing(hf, tower: type[TowerConfig], path: Path) -> tuple[Preprocessing, Preprocessing]:
    """What is done to images and to video frames. LLaVA-1.5 and NeXT have no videos in transformers: their frames are
    made as the tower's own processor makes images."""
    model_type, tile = hf.model_type, hf.vision_config.image_size
    settings = image_settings(path)
    kind = image_kind(settings, OWN_KINDS[model_type])
    images = read_preprocessing(settings, kind, tile)
    if model_type == "llava":
        fit = dataclasses.replace(images.fit, square=False)
        own = images.fit.square and name_fit(images.fit, tile)[1] is None
        return images, dataclasses.replace(images, fit=tower_fit(tower, tile) if own else fit)
    check_anyres(settings, kind, tile)
    check_pinpoints(settings, _pinpoints(hf))
    fit = Fit(True, None, images.fit.crop) if images.fit.size is None else standard_fit("pad", tile)
    images = dataclasses.replace(images, fit=fit)
    if model_type not in VIDEO_KINDS:
        return images, dataclasses.replace(images, fit=tower_fit(tower, tile))
    settings = video_settings(path)
    frames = read_preprocessing(settings, video_kind(settings, VIDEO_KINDS[model_type]), tile)
    check_same_values(images, frames, settings)
    return images, frames


def _pinpoints(hf) -> tuple[tuple[int, int], ...]:
    return tuple((int(h), int(w)) for h, w in hf.image_grid_pinpoints or [])


def _geometry(hf, vision: TowerConfig, images: Preprocessing, frames: Preprocessing, file: Path) -> VisualGeometry:
    common = {
        "tile_size": vision.image_size,
        "patch_size": vision.patch_size,
        "compat": "hf",
        "class_rows": int(vision.keep_class_row),
        "dropped_rows": int(vision.drops_class_row),
        **geometry_fields(images, frames, vision.image_size),
    }
    tiled: dict[str, Any] = {}
    if hf.model_type != "llava":
        tiled |= {"aspect": "anyres", "pinpoints": _pinpoints(hf), "merge": "spatial_unpad"}
    if hf.model_type == "llava_next_video":
        pool = require(hf.spatial_pool_mode, ("average", "max"), "spatial_pool_mode", file)
        tiled |= {
            "video_pool": pool,
            "video_pool_stride": hf.spatial_pool_stride,
            "video_pool_stage": "before",
        }
    if hf.model_type == "llava_onevision":
        shape = re.fullmatch(r"anyres_max_(\d{1,6})", hf.vision_aspect_ratio)
        if not shape:
            raise CheckpointError(f"{file}: vision_aspect_ratio is {hf.vision_aspect_ratio!r}; supported: anyres_max_N")
        tiled |= {"max_tiles": int(shape[1]), "multi_image_anyres": False, "video_pool": "bilinear"}
        tiled |= {"video_pool_stride": 2, "video_pool_stage": "after", "video_newline": "one_token"}
    try:
        return VisualGeometry(**(common | tiled))
    except ImageError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _first(*values):
    return next((value for value in values if value is not None), None)
