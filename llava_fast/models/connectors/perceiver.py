"""A perceiver resampler with 2D positions: learned queries attend to a tile's rows once.

Shapes: T tiles, N rows per tile, C channels, M queries, E their width. Parameter names are those of the original
checkpoints; their pos_embed is recomputed, or read with `own_positions`. Sources: Bai et al. 2023 (Qwen-VL); Guo et
al. 2024 (LLaVA-UHD; thunlp/LLaVA-UHD 7a3a1b6 resampler.py).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.blocks.by_tile import by_tile
from llava_fast.models.blocks.resampling import bicubic
from llava_fast.models.connectors.base import Connector, ConnectorConfig


@dataclass(frozen=True)
class PerceiverConfig(ConnectorConfig):
    """`grid` x `grid` queries over a tile's `side` x `side` rows. `project`: a matrix after the last norm (Qwen-VL,
    LLaVA-UHD; SliME has none). `half_positions`: they are rounded to float16, as SliME keeps them.
    `own_positions`: the positions are a parameter, pos_embed; `trains_positions`: and the original trainer trains them
    (Qwen-VL, LLaVA-UHD; SliME's stay as they are). `views`: a tile's rows are those of so many views end to end, and
    the queries attend to each view alone (Monkey). Raises ValueError where heads or positions do not divide the width.
    """

    rowwise = False

    in_features: int
    out_features: int
    num_heads: int
    grid: int
    side: int
    project: bool = True
    half_positions: bool = False
    own_positions: bool = False
    trains_positions: bool = True
    views: int = 1
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.out_features % self.num_heads or self.out_features % 4:
            raise ValueError(
                f"out_features is {self.out_features}: it must be a multiple of {self.num_heads} heads, and of 4 for "
                "sines and cosines of two axes"
            )

    @property
    def queries(self) -> int:
        return self.grid**2

    @property
    def resizes_rows(self) -> bool:
        """Whether a Linear projects rows to the queries' width."""
        return self.in_features != self.out_features

    def rows_of(self, rows: int) -> int:
        if rows != self.views * self.side**2:
            views = "" if self.views == 1 else f"{self.views} times "
            raise ValueError(
                f"the resampler reads {views}{self.side} x {self.side} rows per tile, and the tower gives {rows}"
            )
        return self.views * self.queries

    @property
    def matrix_size(self) -> int:
        width = self.out_features**2
        return self.first_matrix_size + (2 + self.project) * width + round(2 * width * self.side**2 / self.queries)

    @property
    def first_matrix_size(self) -> int:
        """All rows of a tile pass through it, so each query accounts for several rows."""
        return round(self.resizes_rows * self.in_features * self.out_features * self.side**2 / self.queries)

    def kept_per_row(self, trained: bool) -> int:
        rows = self.side**2 / self.queries
        return round(self.out_features * (6 + trained + 5 * rows) + trained * rows * self.in_features)

    def build(self) -> Perceiver:
        return Perceiver(self)


@dataclass(frozen=True)
class SlicePerceiverConfig(PerceiverConfig):
    """For slices of any shape; `side` is the side of the square slices that cost estimates assume."""

    any_shape = True

    def rows_of(self, rows: int) -> int:
        return self.queries


class Perceiver(Connector):
    """[T, N, in_features] -> [T, M, out_features]. Positions are added to queries and keys, and not to values."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config: PerceiverConfig = config
        width, eps = config.out_features, config.layer_norm_eps
        self.query = nn.Parameter(torch.randn(config.queries, width) * 0.02)
        self.kv_proj = nn.Linear(config.in_features, width, bias=False) if config.resizes_rows else nn.Identity()
        self.attn = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=eps) for _ in range(3))
        if config.project:
            self.proj = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        if config.own_positions:
            table = positions(
                config.grid, width, (config.grid, config.grid), torch.device("cpu"), config.half_positions
            )
            self.pos_embed = nn.Parameter(table.clone().to(self.query.device), requires_grad=config.trains_positions)

    def unused(self) -> list[nn.Parameter]:
        return [self.pos_embed] if self.config.own_positions and not self.config.trains_positions else []

    def forward(self, features_TNC: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """`shape` (rows, columns) of the N rows (of a view), if not the config's square."""
        config, shape = self.config, shape or (self.config.side, self.config.side)
        if (views := config.views) > 1:
            features_TNC = features_TNC.unflatten(1, (views, -1)).flatten(0, 1)
        of_queries, of_rows = self.positions_of(shape, self.query)
        query = self.ln_q(self.query) + of_queries

        def read(rows_TNC: Tensor) -> Tensor:
            value = self.ln_kv(self.kv_proj(rows_TNC))
            return self._attended(query, value + of_rows, value)

        out = self.ln_post(by_tile(read, features_TNC))
        out = out @ self.proj if config.project else out
        return out.unflatten(0, (-1, views)).flatten(1, 2) if views > 1 else out

    def _attended(self, query_ME: Tensor, key_TNE: Tensor, value_TNE: Tensor) -> Tensor:
        """The same queries for each tile: they are projected once. [T, M, E]."""
        attn, heads = self.attn, self.config.num_heads
        if not fused.is_untouched(attn, nn.MultiheadAttention):
            return attn(query_ME.expand(len(key_TNE), -1, -1), key_TNE, value_TNE, need_weights=False)[0]
        weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        query, key, value = (
            F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(-2, -3)
            for x, weight, bias in zip((query_ME, key_TNE, value_TNE), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(query.expand(len(key), -1, -1, -1), key, value)
        return F.linear(out.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

    def positions_of(self, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the queries [M, E] and of rows of this shape [N, E]."""
        config, grid = self.config, (self.config.grid, self.config.grid)
        if config.own_positions:
            table = self.pos_embed if config.trains_positions else self.pos_embed.detach()
            return table, table if shape == grid else bicubic(table.unflatten(0, grid), shape)
        of_queries, of_rows = (
            positions(config.grid, config.out_features, each, like.device, config.half_positions).to(like.dtype)
            for each in (grid, shape)
        )
        return of_queries, of_rows


@functools.cache
def positions(grid: int, width: int, shape: tuple[int, int], device: torch.device, half: bool = False) -> Tensor:
    """Fixed positions of a square grid, float32 [rows * columns, width]: sines, then cosines, of the column in the
    first half of the channels and of the row in the second; resized bicubically to `shape` if that differs. `half`:
    rounded to float16 first.
    """
    with torch.inference_mode(False), torch.device(device):  # so that training can save them for backward
        rate = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        angle = torch.arange(grid, dtype=torch.float64)[:, None] * rate
        axis = torch.cat([angle.sin(), angle.cos()], dim=1).float()
        columns, rows = axis.expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
        table = torch.cat([columns, rows], dim=-1)
        table = table.half().float() if half else table
        if shape != (grid, grid):
            table = F.interpolate(table.permute(2, 0, 1)[None], size=shape, mode="bicubic", align_corners=False)
            table = table[0].permute(1, 2, 0)
        return table.reshape(-1, width).contiguous()
