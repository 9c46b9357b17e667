"""Connectors, from a tower's features to the decoder's width: a kind is one file here and one line below."""

from llava_fast.models.registry import Registry

CONNECTORS = Registry(
    __name__,
    {
        "mlp": "mlp:ProjectorConfig",
        "norm_mlp": "norm_mlp:NormMlpConfig",
        "perceiver": "perceiver:PerceiverConfig",
        "spatial_resampler": "spatial_resampler:SpatialResamplerConfig",
        "pixel_shuffle": "pixel_shuffle:PixelShuffleConfig",
    },
)
