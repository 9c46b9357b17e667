"""A `LlavaConfig` written as config.json in either layout, and the processor files that Hugging Face's needs.

A checkpoint saved in the layout it came in keeps its own config.json; these write one for the other layout.
Hugging Face reads a pinpoint as (height, width) and the original as (width, height), so their sides are swapped:
each image then gets the same tiles as before.

Sources: as for config.py and original.py; transformers 5.23 convert_llava{,_next,_next_video,_onevision}_weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_fast.checkpoints.preprocessing import (
    KINDS,
    OWN_KINDS,
    VIDEO_KINDS,
    tower_fit,
    tower_kind,
    written,
)
from llava_fast.checkpoints.towers import KNOWN_TOWERS
from llava_fast.errors import CheckpointError
from llava_fast.inputs.pictures.preprocessing import Filter, Fit, Preprocessing, name_fit, standard_fit
from llava_fast.models.config import LlavaConfig
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.vit import SiglipConfig

_HF_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
_ORIGINAL_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}


def hf_model_type(config: LlavaConfig) -> str:
    """Which of transformers' four LLaVA classes computes what this config says of images; CheckpointError if none.

    Of videos, transformers knows two kinds only: pooled before the projector (llava_next_video), or bilinear after it
    (llava_onevision). Another kind becomes llava_next, which takes no video.
    """
    if config.layout == "hf":
        return config.model_type
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


def to_hf(config: LlavaConfig, image_token_id: int, video_token_id: int | None, vocab_size: int) -> dict[str, Any]:
    """config.json in Hugging Face's layout. The ids and the vocabulary are those of the tokenizer saved with it,
    which has an image token that original checkpoints lack."""
    if config.projector.kind != "mlp" or config.projector.depth != 2:
        raise CheckpointError(
            f"transformers' LLaVA has a projector of two Linears, not {config.projector.kind!r} of depth "
            f"{config.projector.depth}; save with layout='original'"
        )
    model_type, vision, layers = hf_model_type(config), config.vision, config.vision.feature_layers
    text = dataclasses.replace(config.decoder, vocab_size=vocab_size).to_hf()
    text["rope_parameters"] = {"rope_theta": config.decoder.rope.theta, **config.decoder.rope.scaling()}  # 5.x
    ids = {"bos_token_id": config.source.get("bos_token_id"), "pad_token_id": config.pad_token_id}
    written = {
        "architectures": [_HF_CLASSES[model_type]],
        "model_type": model_type,
        "image_token_index": image_token_id,
        "projector_hidden_act": config.projector.activation,
        "multimodal_projector_bias": config.projector.bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": _select_strategy(vision),
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "text_config": {"model_type": config.decoder.family, **text, **ids, "eos_token_id": _eos(config)},
        "vision_config": tower_fields(vision),
    }
    if model_type in ("llava", "llava_next", "llava_next_video"):
        written["image_seq_length"] = config.geometry.rows_per_tile
    if model_type != "llava":
        written["image_grid_pinpoints"] = [list(pair) for pair in config.geometry.canvases]
    if model_type in ("llava_next_video", "llava_onevision"):
        written["video_token_index"] = video_token_id
    if model_type == "llava_next_video":
        written["spatial_pool_mode"] = config.geometry.video_pool
        written["spatial_pool_stride"] = config.geometry.video_pool_stride
    if model_type == "llava_onevision":
        written["vision_aspect_ratio"] = f"anyres_max_{config.geometry.max_tiles}"
    return written


def to_original(config: LlavaConfig, tower_name: str) -> dict[str, Any]:
    """config.json in the original layout; `tower_name` is its mm_vision_tower."""
    if config.decoder.family not in _ORIGINAL_TYPES:
        raise CheckpointError(
            f"the original layout has no {config.decoder.family!r} decoder, only {', '.join(_ORIGINAL_TYPES)}; save "
            "with layout='hf'"
        )
    model_type, architecture = _ORIGINAL_TYPES[config.decoder.family]
    vision, geometry = config.vision, config.geometry
    if len(vision.feature_layers) > 1 or (isinstance(vision, SiglipConfig) and vision.feature_layers != (-1,)):
        raise CheckpointError(
            f"the original layout reads one hidden state of CLIP or the last of SigLIP, not {vision.feature_layers}"
        )
    projector = config.projector
    if (projector.kind, projector.activation, projector.bias) != ("mlp", "gelu", True):
        raise CheckpointError(f"the original layout has no projector like {projector}")
    if geometry.aspect in ("anyres", "highres"):
        ratio = geometry.aspect if geometry.max_tiles is None else f"anyres_max_{geometry.max_tiles}"
        _check_original_anyres(config)
    else:
        ratio = "pad" if geometry.aspect == "pad" else "square"
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **config.decoder.to_hf(),
        "bos_token_id": config.source.get("text_config", {}).get("bos_token_id"),
        "eos_token_id": _eos(config),
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.decoder.tie_embeddings,
        "use_mm_proj": True,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": f"mlp{projector.depth}x_gelu",
        "mm_vision_tower": tower_name,
        "mm_vision_select_layer": -2 if isinstance(vision, SiglipConfig) else vision.feature_layers[0],
        "mm_vision_select_feature": "cls_patch" if vision.keep_class_row else "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": geometry.merge,
        "image_aspect_ratio": ratio,
        "image_grid_pinpoints": [[width, height] for height, width in geometry.canvases] or None,
        "unfreeze_mm_vision_tower": True,  # tells the original loader that the tower's weights are in the checkpoint
        **_original_video(config),
    }


def _check_original_anyres(config: LlavaConfig) -> None:
    """Raises CheckpointError for AnyRes images of another filter than the original code's, which no file changes, and
    where the one processor file of its tower cannot serve both its tiles and the frames of videos."""
    geometry = config.geometry
    if geometry.filter != "bicubic":
        raise CheckpointError(f"the original layout resizes AnyRes images bicubically, not by {geometry.filter!r}")
    fit = geometry.frame_fit or standard_fit(geometry.frame_aspect, geometry.tile_size)
    if fit.size is not None and fit.size.of(geometry.tile_size, geometry.tile_size) != (geometry.tile_size,) * 2:
        raise CheckpointError(f"the original layout has no AnyRes images beside video frames of {fit.size.fields()}")


def tower_fields(vision: TowerConfig) -> dict[str, Any]:
    """A transformers vision config, without a pooling head."""
    return {"model_type": TOWERS.name_of(type(vision)), **vision.to_hf()}


def tower_processor_fields(config: LlavaConfig) -> dict[str, Any]:
    """preprocessor_config.json of a tower's own repository."""
    geometry, vision = config.geometry, config.vision
    frames = _preprocessing(vision, geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter)
    return written(frames, geometry.tile_size, tower_kind(vision).name)


def has_plain_processor(config: LlavaConfig) -> bool:
    """Whether a tower's processor, as it is in this checkpoint, is the one that its kind has without a file."""
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


def image_processor_fields(config: LlavaConfig) -> dict[str, Any]:
    """preprocessor_config.json for transformers."""
    geometry, tile, model_type = config.geometry, config.geometry.tile_size, hf_model_type(config)
    kind, aspect, fit = OWN_KINDS[model_type][0], geometry.aspect, geometry.fit
    if model_type == "llava" and isinstance(config.vision, SiglipConfig) and aspect == "squash":
        kind = "SiglipImageProcessor"
    if model_type != "llava":  # its tiles have their size already; only images that share a request are fitted
        own = KINDS[kind].fit(tile)
        aspect, fit = name_fit(dataclasses.replace(own, size=None) if fit and fit.size is None else own, tile)
    images = _preprocessing(config.vision, aspect, fit, geometry.filter, geometry.convert_rgb)
    fields = written(images, tile, kind)
    if model_type == "llava":
        return fields
    return fields | {"do_pad": True, "image_grid_pinpoints": [list(pair) for pair in geometry.canvases]}


def video_processor_fields(config: LlavaConfig) -> dict[str, Any] | None:
    """video_preprocessor_config.json for transformers; None for a model that takes no video."""
    geometry, kind = config.geometry, VIDEO_KINDS.get(hf_model_type(config))
    if kind is None:
        return None
    frames = _preprocessing(config.vision, geometry.frame_aspect, geometry.frame_fit, geometry.frame_filter)
    return written(frames, geometry.tile_size, kind)


def processor_fields(config: LlavaConfig) -> dict[str, Any]:
    """processor_config.json for transformers."""
    model_type, vision = hf_model_type(config), config.vision
    names = {kind: name.removesuffix("ForConditionalGeneration") + "Processor" for kind, name in _HF_CLASSES.items()}
    strategy = {"vision_feature_select_strategy": _select_strategy(vision), "image_token": "<image>"}
    if model_type == "llava_onevision":
        return strategy | {
            "processor_class": names[model_type],
            "num_image_tokens": vision.patches_per_tile,
            "vision_aspect_ratio": f"anyres_max_{config.geometry.max_tiles}",
            "video_token": "<video>",
        }
    return strategy | {
        "processor_class": names[model_type],
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.has_class_row),
    }


def _preprocessing(
    vision: TowerConfig, aspect: Any, fit: Fit | None, filter: Filter, convert_rgb: bool = True
) -> Preprocessing:
    values = {name: getattr(vision, name) for name in Preprocessing.VALUES}
    return Preprocessing(fit or standard_fit(aspect, vision.image_size), filter, do_convert_rgb=convert_rgb, **values)


def _select_strategy(vision: TowerConfig) -> str:
    return "full" if vision.keep_class_row or not vision.has_class_row else "default"


def _eos(config: LlavaConfig) -> int | list[int] | None:
    ids = list(config.eos_token_ids)
    return (ids[0] if len(ids) == 1 else ids) or None


def _original_video(config: LlavaConfig) -> dict[str, Any]:
    geometry = config.geometry
    if geometry.video_pool == "none":
        return {}
    pool = {"mm_spatial_pool_mode": geometry.video_pool, "mm_spatial_pool_stride": geometry.video_pool_stride}
    if geometry.video_pool_stage == "before":
        return pool | {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_out_channels": config.vision.hidden_size}
    return pool | {"mm_newline_position": geometry.video_newline}
