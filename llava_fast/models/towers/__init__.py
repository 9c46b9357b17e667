"""Vision towers: each kind is one file here and one line below, by its model_type in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_fast.models.registry import Registry

if TYPE_CHECKING:
    from llava_fast.models.towers.base import TowerConfig

TOWERS: Registry[TowerConfig] = Registry(
    __name__,
    {
        "blip_2_vision_model": "eva:EvaConfig",
        "clip_vision_model": "vit:ClipConfig",
        "eva_lavis": "eva_lavis:EvaLavisConfig",
        "idefics3_vision": "idefics3:Idefics3VisionConfig",
        "instructblip_vision_model": "eva:InstructBlipVisionConfig",
        "instructblipvideo_vision_model": "eva:InstructBlipVideoVisionConfig",
        "internvl_vision": "internvit:InternVitConfig",
        "siglip2_vision_model": "siglip2:Siglip2Config",
        "siglip_vision_model": "vit:SiglipConfig",
        "smolvlm_vision": "idefics3:SmolVlmVisionConfig",
    },
)
