"""Two CLIP towers of one shape: one for images, one for the frames of videos. Video-LLaVA's.

Sources: Lin et al. 2023 (Video-LLaVA); transformers 5.24 modeling_video_llava.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from llava_fast.models.recompute import Recompute
from llava_fast.models.towers.base import Tower
from llava_fast.models.towers.vit import ClipConfig, VisionTower


@dataclass(frozen=True, kw_only=True)
class PairedClipConfig(ClipConfig):
    """The config of both towers."""

    by_modality = True

    @classmethod
    def of(cls, clip: ClipConfig) -> PairedClipConfig:
        return cls(**{field.name: getattr(clip, field.name) for field in fields(clip)})

    @property
    def plain(self) -> ClipConfig:
        return ClipConfig(**{field.name: getattr(self, field.name) for field in fields(self)})

    def build(self) -> PairedClipTower:  # type: ignore[override]  # a pair of what a ClipConfig builds
        return PairedClipTower(self)


class PairedClipTower(Tower):
    """uint8 tiles (or normalised float ones) to the selected features, each tile by the tower of its kind."""

    def __init__(self, config: PairedClipConfig) -> None:
        super().__init__()
        self.config: PairedClipConfig = config
        self.image_tower, self.video_tower = VisionTower(config), VisionTower(config)

    @property
    def recompute(self) -> Recompute:  # type: ignore[override]  # both towers have it
        return self.image_tower.recompute

    @recompute.setter
    def recompute(self, how: Recompute) -> None:
        self.image_tower.recompute = self.video_tower.recompute = how

    def forward(
        self, tiles: Tensor, count: Tensor | None = None, videos: Sequence[tuple[int, int]] = (), every: bool = False
    ) -> Tensor:
        """[T, 3, H, W] -> [T, rows, features], leading rows included. `videos`: the (first, end) of each video's tiles.
        `every`: run both towers, even on zero tiles. Raises ValueError for a `count`, because CUDA graphs do not
        support this pair."""
        if count is not None:
            raise ValueError("tiles of two towers cannot be padded to a bucket")
        of_videos = np.zeros(len(tiles), dtype=bool)
        for first, end in videos:
            of_videos[first:end] = True
        if not every and not of_videos.any():
            return self.image_tower(tiles)
        if not every and of_videos.all():
            return self.video_tower(tiles)
        order = np.argsort(of_videos, kind="stable")  # images first
        images, frames = tiles[to_index(order, tiles)].split([int((~of_videos).sum()), int(of_videos.sum())])
        made = torch.cat([self.image_tower(images), self.video_tower(frames)])
        return made[to_index(np.argsort(order), tiles)]

    def unused(self) -> list[nn.Module]:
        return [*self.image_tower.unused(), *self.video_tower.unused()]


def to_index(order: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(order).to(like.device)
