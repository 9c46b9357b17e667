"""Pixel shuffle: a block of a tile's rows becomes one row of more channels, then an MLP. InternVL's connector.

Shapes: T tiles, N rows per tile, C channels, M = N / scale^2. Sources: Shi et al. 2016; transformers 5.23
modeling_internvl.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.connectors.base import Connector, ConnectorConfig, check_activation


@dataclass(frozen=True)
class BlocksConfig(ConnectorConfig):
    """A connector whose output rows are blocks of `scale` x `scale` rows of a tile."""

    rowwise = False

    in_features: int
    out_features: int
    scale: int = 2

    @property
    def block_features(self) -> int:
        """Channels of a block."""
        return self.in_features * self.scale**2

    def rows_of(self, rows: int) -> int:
        side = math.isqrt(rows)
        if side**2 != rows or side % self.scale:
            raise ValueError(f"{rows} rows per tile are not a square of {self.scale} x {self.scale} blocks")
        return rows // self.scale**2

    @property
    def first_matrix_size(self) -> int:
        return self.block_features * self.out_features


@dataclass(frozen=True)
class PixelShuffleConfig(BlocksConfig):
    """Blocks of `scale` x `scale` rows, a LayerNorm, two Linears with an activation between. Raises ValueError for an
    unknown activation."""

    activation: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_activation(self.activation)

    @property
    def matrix_size(self) -> int:
        return self.first_matrix_size + self.out_features**2

    def kept_per_row(self, trained: bool) -> int:
        return (1 + trained) * self.block_features + (1 + trained) * self.out_features

    def build(self) -> PixelShuffle:
        return PixelShuffle(self)


class PixelShuffle(Connector):
    """[T, N, C] -> [T, M, out_features]: blocks in row-major order, and within a block its rows' channels in row-major
    order."""

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__()
        self.config: PixelShuffleConfig = config
        self.layer_norm = nn.LayerNorm(config.block_features, eps=config.layer_norm_eps)
        self.linear_1 = nn.Linear(config.block_features, config.out_features)
        self.linear_2 = nn.Linear(config.out_features, config.out_features)

    def forward(self, features_TNC: Tensor) -> Tensor:
        blocks = shuffled(features_TNC, self.config.scale)
        _, normed = fused.add_norm(blocks, None, self.layer_norm)
        return self.linear_2(fused.activated(normed, self.linear_1, self.config.activation))


def shuffled(rows_TNC: Tensor, scale: int) -> Tensor:
    """A square of rows [T, N, C] as blocks [T, N / scale^2, scale^2 * C]."""
    blocks = math.isqrt(rows_TNC.shape[1]) // scale
    return rearrange(rows_TNC, "t (bh sh bw sw) c -> t (bh bw) (sh sw c)", bh=blocks, bw=blocks, sh=scale, sw=scale)
