"""From a Hugging Face checkpoint's config.json and processor files to a `LlavaConfig`.

Configs on disk are sparse (llava-hf lists only what differs from the defaults), so the text and vision parts
go through `transformers.AutoConfig`, which also turns 4.x fields (rope_scaling, rope_theta) into 5.x ones.

Sources: transformers 5.23 configuration_{llava,llava_next,llava_next_video,llava_onevision}.py and the
image and video processors beside them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError, ImageError
from llava_fast.inputs.anyres import VisualGeometry
from llava_fast.models.config import DecoderConfig, LlavaConfig, ProjectorConfig, RopeConfig, VisionConfig

HF_MODEL_TYPES = ("llava", "llava_next", "llava_next_video", "llava_onevision")
_TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
_DECODERS = ("llama", "mistral", "qwen2")
_TOWER_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
_PROJECTOR_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
_ROPES = ("default", "linear", "dynamic", "llama3")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if it is absent or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}: it is no LLaVA checkpoint") from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read as JSON ({problem}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`, and {} for a file that is absent."""
    return read_json(path) if path.exists() else {}


def read_hf_config(path: str | Path) -> LlavaConfig:
    """A `LlavaConfig` from a directory in Hugging Face's layout.

    Raises CheckpointError for anything this package cannot run, naming it and what is supported.
    """
    path = Path(path)
    source = read_json(path / "config.json")
    model_type = require(source.get("model_type"), HF_MODEL_TYPES, "model_type", path)
    refuse_quantised(source, path)
    hf = auto_config(path)
    text, tower, images = hf.text_config, hf.vision_config, _image_processor(path)

    layers = hf.vision_feature_layer
    feature_layers = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
    keeps_all = hf.vision_feature_select_strategy == "full"
    kind = _TOWERS[require(tower.model_type, tuple(_TOWERS), "vision_config.model_type", path)]
    if kind == "siglip" and not keeps_all:
        raise CheckpointError(
            f"{path}: vision_feature_select_strategy 'default' drops a class row; SigLIP has none, "
            "so set it to 'full' in config.json"
        )
    vision = tower_config(
        tower,
        kind,
        path,
        feature_layers=feature_layers,
        keep_class_row=keeps_all and kind == "clip",
        **_normalisation(images),
    )
    projector = ProjectorConfig(
        kind="mlp",
        in_features=vision.feature_size,
        out_features=text.hidden_size,
        activation=require(hf.projector_hidden_act, _PROJECTOR_ACTIVATIONS, "projector_hidden_act", path),
        bias=hf.multimodal_projector_bias,
    )
    generation = read_json_if_there(path / "generation_config.json")
    return LlavaConfig(
        vision=vision,
        projector=projector,
        decoder=decoder_config(text, path, tied=bool(hf.tie_word_embeddings)),
        geometry=_geometry(hf, vision, images, path),
        layout="hf",
        model_type=model_type,
        image_token_id=hf.image_token_id,
        video_token_id=getattr(hf, "video_token_id", None),
        has_newline=model_type != "llava",
        eos_token_ids=token_ids(generation.get("eos_token_id", text.eos_token_id)),
        pad_token_id=_first(generation.get("pad_token_id"), source.get("pad_token_id"), text.pad_token_id),
        source=source,
    )


def tower_config(tower, kind: str, path: Path, **choices) -> VisionConfig:
    """A VisionConfig from a transformers CLIP or SigLIP vision config; `choices` are its remaining fields."""
    return VisionConfig(
        kind=kind,
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_layers=tower.num_hidden_layers,
        num_heads=tower.num_attention_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        activation=require(tower.hidden_act, _TOWER_ACTIVATIONS, "vision_config.hidden_act", path),
        layer_norm_eps=tower.layer_norm_eps,
        **choices,
    )


def decoder_config(text, path: Path, tied: bool) -> DecoderConfig:
    """A DecoderConfig from a transformers Llama, Mistral or Qwen2 config."""
    family = require(text.model_type, _DECODERS, "text_config.model_type", path)
    require(text.hidden_act, ("silu",), "text_config.hidden_act", path)
    windows = None
    if family == "mistral" and text.sliding_window is not None:
        windows = (text.sliding_window,) * text.num_hidden_layers
    elif family == "qwen2" and "sliding_attention" in text.layer_types:
        windows = tuple(text.sliding_window if kind == "sliding_attention" else None for kind in text.layer_types)
    return DecoderConfig(
        family=family,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        max_positions=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        rope=_rope(text, path),
        qkv_bias=family == "qwen2" or bool(getattr(text, "attention_bias", False)),
        o_bias=bool(getattr(text, "attention_bias", False)),
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
        tie_embeddings=tied,
        sliding_windows=windows,
    )


def require(value: Any, supported: tuple[str, ...], field: str, path: Path) -> Any:
    """`value` if it is supported, else a CheckpointError that names the field and lists what is."""
    if value not in supported:
        raise CheckpointError(f"{path}: {field} is {value!r}; supported are {', '.join(supported)}")
    return value


def refuse_quantised(source: dict[str, Any], path: Path) -> None:
    if source.get("quantization_config"):
        method = source["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{path} is quantised ({method}); load the unquantised checkpoint it was made from")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """eos_token_id as configs write it (a number, a list, nothing) as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The uint8 colour a square is padded with: int(mean * 255), not rounded (mm_utils.py)."""
    return tuple(int(channel * 255) for channel in mean)


def auto_config(path: Path):
    """What transformers makes of a directory's config.json; CheckpointError if it cannot."""
    from transformers import AutoConfig  # seconds to import: only a process that loads a checkpoint pays

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as problem:  # its validators raise a dozen unrelated types
        raise CheckpointError(f"{path}: transformers cannot read this config.json: {problem}") from problem


def _rope(text, path: Path) -> RopeConfig:
    rope = text.rope_parameters
    kind = require(rope.get("rope_type", "default"), _ROPES, "rope_type", path)
    chosen = {"theta": float(rope["rope_theta"])}
    if kind != "default":
        chosen["factor"] = float(rope["factor"])
    if kind == "dynamic":
        chosen["original_max_positions"] = text.max_position_embeddings
    if kind == "llama3":
        chosen["low_freq_factor"] = float(rope["low_freq_factor"])
        chosen["high_freq_factor"] = float(rope["high_freq_factor"])
        chosen["original_max_positions"] = int(rope["original_max_position_embeddings"])
    return RopeConfig(kind=kind, **chosen)


def _image_processor(path: Path) -> dict[str, Any]:
    """The image processor's settings: its own file, or a section of processor_config.json (5.x)."""
    own = read_json_if_there(path / "preprocessor_config.json")
    return own or read_json_if_there(path / "processor_config.json").get("image_processor", {})


def _normalisation(images: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """image_mean and image_std where the processor states them (VisionConfig's own are CLIP's)."""
    return {key: tuple(images[key]) for key in ("image_mean", "image_std") if images.get(key) is not None}


def _geometry(hf, vision: VisionConfig, images: dict[str, Any], path: Path) -> VisualGeometry:
    common = {
        "tile_size": vision.image_size,
        "patch_size": vision.patch_size,
        "compat": "hf",
        "class_rows": int(vision.keep_class_row),
        "dropped_rows": int(vision.drops_class_row),
        "pad_color": mean_color(vision.image_mean),
        "frame_aspect": "crop" if vision.kind == "clip" else "squash",
    }
    if hf.model_type == "llava":
        return VisualGeometry(aspect=_single_tile_aspect(images, vision.image_size, path), **common)
    tiled = {
        "aspect": "anyres",
        "pinpoints": tuple((int(h), int(w)) for h, w in hf.image_grid_pinpoints),
        "merge": "spatial_unpad",
    }
    if hf.model_type == "llava_next_video":
        pool = require(hf.spatial_pool_mode, ("average", "max"), "spatial_pool_mode", path)
        tiled |= {
            "video_pool": pool,
            "video_pool_stride": hf.spatial_pool_stride,
            "video_pool_stage": "before",
        }
    if hf.model_type == "llava_onevision":
        shape = re.fullmatch(r"anyres_max_(\d+)", hf.vision_aspect_ratio)
        if not shape:
            raise CheckpointError(f"{path}: vision_aspect_ratio is {hf.vision_aspect_ratio!r}; supported: anyres_max_N")
        tiled |= {"max_tiles": int(shape[1]), "multi_image_anyres": False, "video_pool": "bilinear"}
        tiled |= {"video_pool_stride": 2, "video_pool_stage": "after", "video_newline": "one_token"}
    try:
        return VisualGeometry(**common, **tiled)
    except ImageError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem


def _single_tile_aspect(images: dict[str, Any], tile: int, path: Path) -> str:
    """How LLaVA-1.5's processor makes one square tile: "pad", "crop" (the default) or "squash" (SigLIP's)."""
    size, crop = images.get("size", {}), images.get("crop_size", {})
    sides = [size] if isinstance(size, int) else list(size.values())
    sides += [crop] if isinstance(crop, int) else list(crop.values())
    if wrong := [side for side in sides if side != tile]:
        raise CheckpointError(
            f"{path}: the image processor makes images of {wrong[0]} pixels, the vision tower reads {tile}; "
            "correct size and crop_size in preprocessor_config.json"
        )
    if images.get("do_pad"):
        return "pad"
    squashes = isinstance(size, dict) and "height" in size and not images.get("do_center_crop")
    return "squash" if squashes else "crop"


def _first(*values):
    return next((value for value in values if value is not None), None)
