"""Pixel shuffle, then one Linear without a bias. The connector of Idefics3 and SmolVLM.

Shapes: T tiles, N rows per tile, C channels, M = N / scale^2. Source: transformers 5.24 modeling_idefics3.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llava_fast.models.connectors.base import Connector
from llava_fast.models.connectors.pixel_shuffle import BlocksConfig, shuffled


@dataclass(frozen=True)
class ShuffleLinearConfig(BlocksConfig):
    """Blocks of `scale` x `scale` rows and a Linear."""

    hf_names: ClassVar = {"linear": "modality_projection.proj"}

    @property
    def matrix_size(self) -> int:
        return self.first_matrix_size

    def kept_per_row(self, trained: bool) -> int:
        return trained * self.block_features

    def build(self) -> ShuffleLinear:
        return ShuffleLinear(self)


class ShuffleLinear(Connector):
    """[T, N, C] -> [T, M, out_features]: blocks in row-major order, and within a block its rows' channels in row-major
    order."""

    def __init__(self, config: ShuffleLinearConfig) -> None:
        super().__init__()
        self.config: ShuffleLinearConfig = config
        self.linear = nn.Linear(config.block_features, config.out_features, bias=False)

    def forward(self, features_TNC: Tensor) -> Tensor:
        return self.linear(shuffled(features_TNC, self.config.scale))
