"""From an original LLaVA checkpoint's config.json (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT) to a `LlavaConfig`.

These are a decoder's config with `mm_*` fields beside it. The vision tower is only named; see towers.py. There is
no image token: prompts are tokenised in the pieces between `<image>` marks, so image_token_id is the original's
own placeholder -200 (llava/constants.py).

Sources: haotian-liu/LLaVA c121f04 and LLaVA-VL/LLaVA-NeXT df17966: llava_arch.py, mm_utils.py,
multimodal_encoder/{builder,clip_encoder,siglip_encoder}.py, multimodal_projector/builder.py; 01-ai/Yi VL/ for
`mlp2x_gelu_Norm`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fast.checkpoints import fields
from llava_fast.checkpoints.config import (
    check_feature_layers,
    decoder_config,
    eos_token_ids,
    refuse_quantised,
    require,
)
from llava_fast.checkpoints.files import check_fields, one_line, read_json, read_json_if_there
from llava_fast.checkpoints.preprocessing import geometry_fields, padded
from llava_fast.checkpoints.towers import Tower, find_tower
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.inputs.tiling.anyres import VisualGeometry, parse_pinpoints
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.vit import SiglipConfig

IMAGE_TOKEN_ID = -200
FAMILIES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_MERGES = ("flat", "spatial", "spatial_unpad", "spatial_maxpool2x2")
_RATIOS = ("square", "pad", "anyres", "highres")
_DECODER_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters attention_bias "
    "mlp_bias sliding_window use_sliding_window max_window_layers layer_types tie_word_embeddings bos_token_id "
    "eos_token_id pad_token_id"
).split()


def is_original(source: dict[str, Any]) -> bool:
    """Whether a config.json is an original LLaVA's (Hugging Face's has sections, this one mm_ fields)."""
    return "mm_vision_tower" in source or source.get("model_type") in ("llava_llama", "llava_mistral", "llava_qwen")


def read_original_config(path: Path, vision_tower: str | Path | None = None) -> tuple[LlavaConfig, Tower]:
    """The config of an original LLaVA directory, and its tower. `vision_tower` says where that is, if elsewhere.

    Raises CheckpointError for anything this package cannot run, naming it and what is supported.
    """
    return original_config(read_json(path / "config.json"), path, vision_tower)


def original_config(
    source: dict[str, Any], path: Path, vision_tower: str | Path | None = None
) -> tuple[LlavaConfig, Tower]:
    """As `read_original_config`, from what config.json holds, or would hold; `path` has the other files."""
    file = path / "config.json"
    check_fields(source, fields.OriginalConfig, file)
    model_type = require(source.get("model_type"), tuple(FAMILIES), "model_type", file)
    refuse_quantised(source, file)
    if source.get("s2"):
        raise CheckpointError(f"{file}: s2 (multi-scale towers) is not supported")
    if not source.get("mm_vision_tower"):
        raise CheckpointError(f"{file} has no mm_vision_tower, so it is a language model, not a LLaVA")
    decoder = _decoder(source, file)
    tower = find_tower(source["mm_vision_tower"], path, vision_tower)
    vision = _select_features(tower.config, source, file)
    generation = read_json_if_there(path / "generation_config.json", fields.Generation)
    merge = source.get("mm_patch_merge_type", "flat")
    return LlavaConfig(
        vision=vision,
        projector=_projector(source, vision.feature_size, decoder.hidden_size, file),
        decoder=decoder,
        geometry=_geometry(source, vision, tower, merge, file),
        layout="original",
        model_type=model_type,
        image_token_id=IMAGE_TOKEN_ID,
        has_newline="unpad" in merge,
        eos_token_ids=eos_token_ids(generation, source.get("eos_token_id")),
        pad_token_id=generation.get("pad_token_id", source.get("pad_token_id")),
        source=source,
        tower_processor=dict(tower.settings.content),
    ), tower


def text_config(source: Mapping[str, Any], file: Path):
    """What transformers makes of an original config.json's decoder; CheckpointError if it cannot."""
    from transformers import CONFIG_MAPPING  # seconds to import, as in config.py

    family = FAMILIES[require(source.get("model_type"), tuple(FAMILIES), "model_type", file)]
    try:
        return CONFIG_MAPPING[family](**{field: source[field] for field in _DECODER_FIELDS if field in source})
    except Exception as problem:  # its validators raise a dozen unrelated types
        raise CheckpointError(f"{file} describes no {family} decoder: {one_line(problem)}") from problem


def _decoder(source: Mapping[str, Any], file: Path):
    text = text_config(source, file)
    return decoder_config(text, file, tied=bool(text.tie_word_embeddings))


def _select_features(tower: TowerConfig, source: dict[str, Any], file: Path) -> TowerConfig:
    """The tower with the hidden state that the projector reads."""
    if isinstance(tower, SiglipConfig):
        # SigLipVisionTower deletes its last layer and takes the last hidden state of the rest, whatever
        # mm_vision_select_layer says.
        if tower.num_layers < 2:
            raise CheckpointError(
                f"{file}: the original drops the last layer of a SigLIP tower, and this one has no other"
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
    sizes = {"in_features": in_features, "out_features": out_features}
    if depth := re.fullmatch(r"mlp(\d{1,2})x_gelu", kind):
        return ProjectorConfig(kind="mlp", depth=int(depth[1]), **sizes)
    known = {"linear": ("linear", 1), "identity": ("identity", 0), "mlp2x_gelu_Norm": ("yi", 2)}
    if kind not in known:
        raise CheckpointError(f"{file}: mm_projector_type is {kind!r}; supported are mlpNx_gelu, {', '.join(known)}")
    name, depth = known[kind]
    return ProjectorConfig(kind=name, depth=depth, **sizes)


def _geometry(source: dict[str, Any], vision: TowerConfig, tower: Tower, merge: str, file: Path) -> VisualGeometry:
    if merge.removesuffix("_nobase") not in _MERGES:
        raise CheckpointError(f"{file}: mm_patch_merge_type is {merge!r}; supported: {', '.join(_MERGES)}, + _nobase")
    ratio = source.get("image_aspect_ratio") or "square"
    shrink = re.fullmatch(r"anyres_max_(\d{1,6})", ratio)
    if not shrink and ratio not in _RATIOS:
        raise CheckpointError(f"{file}: image_aspect_ratio is {ratio!r}; supported: {', '.join(_RATIOS)}, anyres_max_N")
    tile, images, tiled = vision.image_size, tower.preprocessing, {}
    try:
        if shrink or ratio in ("anyres", "highres"):
            tower.check_anyres()
            pinpoints = parse_pinpoints(source.get("image_grid_pinpoints") or [], tile)
            # mm_utils.py calls PIL's resize without a filter, which is bicubic; the processor then changes no size.
            tiled = {"aspect": "anyres" if shrink else ratio, "pinpoints": pinpoints, "fit": None, "filter": "bicubic"}
        elif ratio == "pad":
            images = padded(images, tower.settings, tile)
        return VisualGeometry(
            tile_size=tile,
            patch_size=vision.patch_size,
            compat="llava",
            merge=merge,
            max_tiles=int(shrink[1]) if shrink else None,
            class_rows=int(vision.keep_class_row),
            dropped_rows=int(vision.drops_class_row),
            **(geometry_fields(images, tower.preprocessing, tile) | tiled),
            **_video(source, merge, file),
        )
    except ImageError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _video(source: dict[str, Any], merge: str, file: Path) -> dict[str, Any]:
    """Pooling and newlines of video. The released LLaVA-NeXT-Video pools before the projector (a resampler of its
    own, no newline rows); later LLaVA-NeXT pools after it."""
    if source.get("mm_resampler_type") == "spatial_pool":
        mode = require(source.get("mm_spatial_pool_mode"), ("average", "max"), "mm_spatial_pool_mode", file)
        return {
            "video_pool": mode,
            "video_pool_stride": source["mm_spatial_pool_stride"],
            "video_pool_stage": "before",
            "video_newline": "no_token",
        }
    if source.get("mm_resampler_type"):
        raise CheckpointError(f"{file}: mm_resampler_type {source['mm_resampler_type']!r} is not supported")
    newline = source.get("mm_newline_position", "one_token")
    require(newline, ("grid", "frame", "one_token", "no_token"), "mm_newline_position", file)
    if "unpad" not in merge:
        if merge != "flat" and newline in ("grid", "frame"):
            raise CheckpointError(f"{file}: mm_newline_position {newline!r} needs an unpadding mm_patch_merge_type")
        newline = "no_token"
    stride = source.get("mm_spatial_pool_stride")
    if not stride or stride == 1:
        return {"video_pool": "none", "video_newline": newline}
    modes = ("average", "max", "bilinear")
    return {
        "video_pool": require(source.get("mm_spatial_pool_mode", "average"), modes, "mm_spatial_pool_mode", file),
        "video_pool_stride": stride,
        "video_pool_stage": "after",
        "video_newline": newline,
    }
