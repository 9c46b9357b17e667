"""Vision towers: a kind is one file here and one line below, by the model_type that transformers gives its config."""

from llava_fast.models.registry import Registry

TOWERS = Registry(
    __name__,
    {
        "clip_vision_model": "vit:ClipConfig",
        "internvl_vision": "internvit:InternVitConfig",
        "siglip2_vision_model": "siglip2:Siglip2Config",
        "siglip_vision_model": "vit:SiglipConfig",
    },
)
