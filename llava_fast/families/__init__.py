"""Families of checkpoints: each is one file here, and one line below per model_type of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_fast.families.base import Family
from llava_fast.families.known_towers import Tower
from llava_fast.families.parts import require
from llava_fast.models.config import LlavaConfig
from llava_fast.models.registry import Registry
from llava_fast.storage.files import read_json

FAMILIES: Registry[Family] = Registry(
    __name__,
    {
        "llava": "llava:Llava",
        "llava_next": "llava_next:LlavaNext",
        "llava_next_video": "llava_next:LlavaNextVideo",
        "llava_onevision": "llava_next:LlavaOnevision",
        "llava_llama": "llava_original:LlavaOriginal",
        "llava_mistral": "llava_original:LlavaOriginal",
        "llava_qwen": "llava_original:LlavaOriginal",
        "internvl": "internvl:InternVl",
        "idefics3": "idefics3:Idefics3",
        "smolvlm": "idefics3:SmolVlm",
        "vipllava": "vipllava:VipLlava",
        "video_llava": "video_llava:VideoLlava",
        "llava_uhd": "llava_uhd:LlavaUhd",
        "slime": "slime:Slime",
        "blip-2": "blip2:Blip2",
        "instructblip": "instructblip:InstructBlip",
        "instructblipvideo": "instructblip:InstructBlipVideo",
        "InternLMXComposer": "xcomposer:XComposer",
        "llama_vid": "llama_vid:LlamaVid",
        "qwen": "qwen_vl:QwenVl",
        "monkey": "qwen_vl:Monkey",
    },
)
_ORIGINAL = "llava_llama"
"""The registry's name of original LLaVAs. Their config.json has mm_vision_tower, and any model_type, also "llava"."""
WITHOUT_DECODER: Registry[Family] = Registry(__name__, {"blip-2-retrieval": "blip2_retrieval:Blip2Retrieval"})
"""Those of models that compare images and texts (models.retrieval), by names that no config.json has."""
_BY_ARCHITECTURE = {("blip-2", "Blip2ForImageTextRetrieval"): "blip-2-retrieval"}
"""(model_type, class in `architectures`) -> a name in WITHOUT_DECODER."""
_BY_CONNECTOR = {
    "adapt_spatial_resampler_v1": "llava_uhd",
    "uhd_v1_query64": "llava_uhd",
    "uhd_first": "llava_uhd",
    "gated": "slime",
}
"""mm_projector_type -> the registry's name of a family with its own original layout."""
_BY_FIELD = {"bert_type": "llama_vid"}
"""A field that only such a family's config.json has -> the registry's name."""
_BY_PART = {"qformer_from": "llama_vid"}
"""A field of a recipe's Assembly -> the registry's name of the family that it assembles."""


def assembling_family(parts: Mapping[str, Any]) -> Family:
    """The family of a model that is assembled from `parts`, the fields of a recipe's Assembly."""
    return FAMILIES[next((family for field, family in _BY_PART.items() if parts[field] is not None), _ORIGINAL)]()


def find_family(source: dict[str, Any]) -> Family | None:
    """The family of a config.json, or None."""
    kind = source.get("model_type")
    for (model_type, architecture), name in _BY_ARCHITECTURE.items():
        if kind == model_type and source.get("architectures") == [architecture]:
            return WITHOUT_DECODER[name]()
    if "mm_vision_tower" in source:
        connector = source.get("mm_projector_type")
        kind = _BY_CONNECTOR.get(connector, _ORIGINAL) if isinstance(connector, str) else _ORIGINAL
        kind = next((family for field, family in _BY_FIELD.items() if field in source), kind)
    return FAMILIES[kind]() if isinstance(kind, str) and kind in FAMILIES else None


def family_of(source: dict[str, Any], file: Path) -> Family:
    """The family of a config.json, which is `file`. Raises CheckpointError if there is none."""
    family = find_family(source)
    if family is None:
        require(source.get("model_type"), tuple(FAMILIES), "model_type", file)
    assert family is not None
    return family


def family_of_config(config: LlavaConfig) -> Family:
    """The family that a model was read as."""
    if config.model_type in WITHOUT_DECODER:
        return WITHOUT_DECODER[config.model_type]()
    kind = FAMILIES.get(config.model_type)
    return FAMILIES[_ORIGINAL]() if kind is None or kind.layout != config.layout else kind()


def writing_family(config: LlavaConfig, layout: str) -> Family:
    """The family that a model is saved as in `layout`. Raises CheckpointError if there is none."""
    own = family_of_config(config)
    return own if own.layout == layout else FAMILIES[own.other(config)]()


def read_config(path: Path, vision_tower: str | Path | None = None) -> tuple[LlavaConfig, Tower | None]:
    """The config of a directory, and its tower if that has its own repository (see Family). Raises CheckpointError."""
    source = read_json(path / "config.json")
    return family_of(source, path / "config.json").read_with_tower(source, path, vision_tower)
