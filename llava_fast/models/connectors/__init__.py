"""Connectors, from a tower's features to the decoder's width: each kind is one file here and one line below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_fast.models.registry import Registry

if TYPE_CHECKING:
    from llava_fast.models.connectors.base import ConnectorConfig

CONNECTORS: Registry[ConnectorConfig] = Registry(
    __name__,
    {
        "context_content": "context_content:ContextContentConfig",
        "framed_qformer": "framed_qformer:FramedQFormerConfig",
        "mlp": "mlp:ProjectorConfig",
        "norm_mlp": "norm_mlp:NormMlpConfig",
        "overview_mixture": "overview_mixture:OverviewMixtureConfig",
        "perceiver": "perceiver:PerceiverConfig",
        "slice_perceiver": "perceiver:SlicePerceiverConfig",
        "qformer": "qformer:QFormerConfig",
        "retrieval_qformer": "retrieval_qformer:RetrievalQFormerConfig",
        "spatial_resampler": "spatial_resampler:SpatialResamplerConfig",
        "pixel_shuffle": "pixel_shuffle:PixelShuffleConfig",
        "shuffle_linear": "shuffle_linear:ShuffleLinearConfig",
    },
)
