"""CLIP over slices of any size, with positions interpolated to each one's grid of patches. LLaVA-UHD's tower.

Shapes: R patches (all slices concatenated), C width. A tile is one patch. Parameter names are those of transformers'
CLIPVisionModel. Sources: Guo et al. 2024 (LLaVA-UHD); thunlp/LLaVA-UHD 30a3bc3 adapt_clip_vision_model.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from llava_fast.models.blocks.resampling import Grid, bicubic
from llava_fast.models.towers.vit import ClipConfig, Embeddings, VisionTower, embed_patches, grouped, prepare_tiles


@dataclass(frozen=True, kw_only=True)
class ClipSlicesConfig(ClipConfig):
    """A CLIP tower whose positions were learned on squares of `trained_size` pixels. Its class rows are dropped."""

    native_sizes = True

    trained_size: int

    @classmethod
    def of(cls, clip: ClipConfig) -> ClipSlicesConfig:
        given = {field.name: getattr(clip, field.name) for field in fields(clip)}
        return cls(**(given | {"image_size": clip.patch_size, "trained_size": clip.image_size}))

    @property
    def plain(self) -> ClipConfig:
        """The same tower over squares."""
        given = {field.name: getattr(self, field.name) for field in fields(ClipConfig)}
        return ClipConfig(**(given | {"image_size": self.trained_size}))

    @property
    def rows_per_tile(self) -> int:
        return 1

    @property
    def patches_per_image(self) -> int:
        return (self.trained_size // self.patch_size) ** 2

    def attention_flops(self, tiles: int) -> float:
        """For slices with as many patches as there are positions."""
        return 4.0 * tiles * self.patches_per_image * self.hidden_size * self.layers_needed

    def build(self) -> ClipSlicesTower:
        return ClipSlicesTower(self)


class ClipSlicesEmbeddings(Embeddings):
    """Rows [1, R + S, C] of patches [R, 3, P, P] of S slices: each slice's class row, then its patches."""

    def __init__(self, config: ClipSlicesConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding(config.patches_per_image + 1, width)

    def forward(self, tiles: Tensor, mean: Tensor, std: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        table = self.position_embedding.weight
        none = table.new_zeros(1, table.shape[1])  # positions are added below
        rows = embed_patches(self.patch_embedding, tiles, none, None, mean, std).flatten(0, 1)
        side = math.isqrt(len(table) - 1)
        positions = {grid: bicubic(table[1:].unflatten(0, (side, side)), grid) for grid in dict.fromkeys(grids)}
        first = (self.class_embedding + table[0])[None]
        slices = rows.split([rows * columns for rows, columns in grids])
        made = [
            part for grid, patches in zip(grids, slices, strict=True) for part in (first, patches + positions[grid])
        ]
        return torch.cat([rows[:0], *made])[None]


class ClipSlicesTower(VisionTower):
    """uint8 patches (or normalised float ones) of slices end to end to the selected features.

    All layers are kept, so that saving is complete; only `config.layers_needed` of them run.
    """

    config: ClipSlicesConfig

    def build_embeddings(self) -> ClipSlicesEmbeddings:
        return ClipSlicesEmbeddings(self.config)

    def forward(self, tiles: Tensor, count: Tensor | None = None, grids: tuple[Grid, ...] = ()) -> Tensor:
        """[R, 3, P, P] uint8 or normalised float -> [1, R, features], in the weights' dtype. `grids`: the (rows,
        columns) of each slice's patches. Raises ValueError if grids and patches differ in number, and for a `count`,
        because CUDA graphs do not support slices of various sizes."""
        if count is not None:
            raise ValueError("patches of slices of many sizes cannot be padded to a bucket")
        lengths = [1 + rows * columns for rows, columns in grids]
        if sum(lengths) - len(grids) != len(tiles):
            raise ValueError(f"{len(tiles)} patches, but the slices' grids have {sum(lengths) - len(grids)}")
        tiles, mean, std = prepare_tiles(self.config, tiles, self.embeddings.position_embedding.weight)
        rows = self.run_layers(self.embeddings(tiles, mean, std, grids), grouped(lengths))[0]
        return torch.cat([rows[:0], *(part[1:] for part in rows.split(lengths))])[None]
