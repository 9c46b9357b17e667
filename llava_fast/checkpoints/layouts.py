"""A `LlavaConfig` written as config.json in either layout, and the processor files that Hugging Face's needs.

A checkpoint saved in the layout it came in keeps its own config.json; these write one for the other layout.
Hugging Face reads a pinpoint as (height, width) and the original as (width, height), so their sides are swapped:
each image then gets the same tiles as before.

Sources: as for config.py and original.py; transformers 5.23 convert_llava{,_next,_next_video,_onevision}_weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_fast.checkpoints.towers import KNOWN_TOWERS
from llava_fast.errors import CheckpointError
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
    model_type, architecture = _ORIGINAL_TYPES[config.decoder.family]
    vision, geometry = config.vision, config.geometry
    if len(vision.feature_layers) > 1 or (isinstance(vision, SiglipConfig) and vision.feature_layers != (-1,)):
        raise CheckpointError(
            f"the original layout reads one hidden state of CLIP or the last of SigLIP, not {vision.feature_layers}"
        )
    projector = config.projector
    if (projector.kind, projector.activation, projector.bias) != ("mlp", "gelu", True):
        raise CheckpointError(f"the original layout has no projector like {projector}")
    ratios = {vision.own_aspect: "square", "pad": "pad", "anyres": "anyres", "highres": "highres"}
    if geometry.aspect not in ratios:
        raise CheckpointError(f"the original layout does not {geometry.aspect} images for a {vision.kind} tower")
    shrinks = geometry.max_tiles is not None
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
        "image_aspect_ratio": f"anyres_max_{geometry.max_tiles}" if shrinks else ratios[geometry.aspect],
        "image_grid_pinpoints": [[width, height] for height, width in geometry.canvases] or None,
        "unfreeze_mm_vision_tower": True,  # tells the original loader that the tower's weights are in the checkpoint
        **_original_video(config),
    }


def tower_fields(vision: TowerConfig) -> dict[str, Any]:
    """A transformers vision config, without a pooling head."""
    return {"model_type": TOWERS.name_of(type(vision)), **vision.to_hf()}


def tower_processor_fields(vision: TowerConfig) -> dict[str, Any]:
    """The image processor of a tower's own repository: CLIP's crops, SigLIP's squashes."""
    square = {"height": vision.image_size, "width": vision.image_size}
    fields = _pixel_fields(vision)
    if isinstance(vision, SiglipConfig):
        return {"image_processor_type": "SiglipImageProcessor", "size": square, **fields}
    size = {"size": {"shortest_edge": vision.image_size}, "crop_size": square, "do_center_crop": True}
    return {"image_processor_type": "CLIPImageProcessor", **size, **fields}


def own_tower(vision: TowerConfig) -> TowerConfig:
    """The tower as its own repository has it: original LLaVA deletes SigLIP's last layer, and picks features."""
    layers = vision.num_layers + (isinstance(vision, SiglipConfig))
    return dataclasses.replace(vision, num_layers=layers, feature_layers=(-2,), keep_class_row=False)


def known_tower_name(vision: TowerConfig) -> str | None:
    """The Hub repository that has exactly this tower, if it is one of the known ones."""
    return next((name for name, known in KNOWN_TOWERS.items() if known == own_tower(vision)), None)


def image_processor_fields(config: LlavaConfig) -> dict[str, Any]:
    """preprocessor_config.json for transformers."""
    geometry, size = config.geometry, config.geometry.tile_size
    model_type = hf_model_type(config)
    square = {"height": size, "width": size}
    common = _pixel_fields(config.vision)
    if model_type == "llava_onevision":
        kind = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": square, "do_pad": True}
    elif isinstance(config.vision, SiglipConfig) and model_type == "llava" and geometry.aspect == "squash":
        kind = {"image_processor_type": "SiglipImageProcessor", "size": square}
    else:
        name = "LlavaImageProcessor" if model_type == "llava" else "LlavaNextImageProcessor"
        kind = {"image_processor_type": name, "size": {"shortest_edge": size}, "crop_size": square}
        kind |= {"do_center_crop": True, "do_pad": geometry.aspect in ("pad", "anyres")}
    if model_type != "llava":
        kind["image_grid_pinpoints"] = [list(pair) for pair in geometry.canvases]
    return common | kind


def video_processor_fields(config: LlavaConfig) -> dict[str, Any] | None:
    """video_preprocessor_config.json for transformers; None for a model that takes no video."""
    images, model_type = image_processor_fields(config), hf_model_type(config)
    if model_type not in ("llava_next_video", "llava_onevision"):
        return None
    for field in ("image_processor_type", "image_grid_pinpoints", "do_pad"):
        images.pop(field, None)
    name = "LlavaNextVideoVideoProcessor" if model_type == "llava_next_video" else "LlavaOnevisionVideoProcessor"
    return {"video_processor_type": name, **images}


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


def _pixel_fields(vision: TowerConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


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
