"""A LLaVA without its decoder: from tiles to the rows that stand for images and videos in a decoder's input."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.inputs.plan.from_ids import placement_columns
from llava_fast.inputs.tiling.rows import TOKEN, VisualRows
from llava_fast.models import encode
from llava_fast.models.config import VisualConfig
from llava_fast.models.connectors.base import TILES_AT_ONCE
from llava_fast.models.placement import Placement, to_device

Grids = Sequence[tuple[int, int]]
"""(rows, columns) of each image of native size, or (first, end) of each video's tiles."""


class VisualModel(nn.Module):
    """Tower, connector and newline. Its parameters have the names that they have in a LlavaModel, which is one."""

    config: VisualConfig

    def __init__(self, config: VisualConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = config.vision.build()
        self.projector = config.projector.build()
        if config.has_newline:
            self.image_newline = nn.Parameter(torch.zeros(config.width))

    def visual_embeds(
        self, tiles: Tensor, images: Sequence[VisualRows], videos: Sequence[VisualRows] = ()
    ) -> list[Tensor]:
        """The rows [rows, width] of each image, then of each video, as they are placed among a prompt's text.

        tiles   uint8 (or normalised floating) [tiles, 3, H, W]: those of each image, then each video's frames.
        images, videos  their rows (inputs.tiling.anyres.image_rows, inputs.tiling.video.video_rows).
        Raises ValueError if the tiles differ in number from those of the rows, and for rows that are text tokens.
        """
        items = [*images, *videos]
        ends = list(itertools.accumulate((rows.tiles for rows in items), initial=0))
        if len(tiles) != ends[-1]:
            raise ValueError(f"{len(tiles)} tiles are given, but the images and videos have {ends[-1]}")
        if any((rows.kind == TOKEN).any() for rows in items):
            raise ValueError("text tokens stand around these tiles, and only the decoder has their rows")
        if not items:
            return []
        rows_per_tile = self.config.geometry.tower_rows_per_tile
        columns, pools = placement_columns(images, None, 0, rows_per_tile, videos)
        at = Placement.of(to_device(columns, tiles.device).get, pools)
        grids = [grid for rows in items for grid in rows.grids]
        of_videos = list(itertools.pairwise(ends))[len(images) :]
        features = self.features(tiles, grids, of_videos)
        parts = self.parts(grids, images=[rows.tiles for rows in items])
        made = encode.visual_embeds(parts, features, at, self.config.width)
        return list(made.split([len(rows) for rows in items]))

    def features(
        self, tiles: Tensor, grids: Grids = (), videos: Grids = (), count: Tensor | None = None, every: bool = False
    ) -> Tensor:
        """The tower's rows of all tiles end to end [tiles * rows, features].

        grids   of images of native sizes.
        videos  for a tower with weights of their own for videos; `every`: it runs all its weights.
        count   int32 [1]: the number of real tiles (see Tower.forward).
        """
        vision = self.config.vision
        if count is None and not every and self._splits(tiles):
            return torch.cat([self.features(block) for block in tiles.split(TILES_AT_ONCE)])
        told: dict[str, Any] = {"grids": tuple(grids)} if vision.native_sizes else {}
        if vision.by_modality:
            told |= {"videos": tuple(videos), "every": every}
        return self.vision_tower(tiles, count=count, **told).flatten(0, 1)

    def _splits(self, tiles: Tensor) -> bool:
        """Whether tiles run in blocks: too many for one pass, and nothing is kept for a backward pass."""
        vision = self.config.vision
        mixed = vision.native_sizes or vision.by_modality
        return len(tiles) > TILES_AT_ONCE and not mixed and not torch.is_grad_enabled()

    def projected(
        self, tiles: Tensor, instruction: Tensor | None, read: Tensor | None = None
    ) -> tuple[encode.Parts, Tensor] | None:
        """(parts whose `project` only selects rows, the connector's rows of all tiles) where tower and connector can
        run in blocks of tiles: a connector that reads each tile alone, without gradients, for many. None elsewhere.

        read  int64: the tile that the connector reads for each of its tiles; None: they are the same.
        """
        connector = self.config.projector
        if connector.rowwise or connector.reads_images or not self._splits(tiles if read is None else read):
            return None
        made, rows = [], self.config.geometry.tower_rows_per_tile
        for start in range(0, len(tiles if read is None else read), TILES_AT_ONCE):
            at = slice(start, start + TILES_AT_ONCE)
            block = tiles[at] if read is None else tiles[read[at]]
            told = None if instruction is None else instruction[at]
            every = torch.arange(len(block) * rows, device=tiles.device)
            made.append(self.parts((), told).project(self.features(block), every, []))
        return self.parts()._replace(project=_selected), torch.cat(made)

    def parts(self, grids: Grids = (), instruction: Tensor | None = None, images: Sequence[int] = ()) -> encode.Parts:
        """What stands between tower and decoder; `grids` of images of native sizes, `instruction` for a connector that
        reads text (see ConnectorConfig.reads_text), `images` for one that reads images (reads_images)."""
        vision = self.config.vision
        connector: Callable[..., Tensor] = self.projector
        if self.config.projector.reads_text:
            connector = functools.partial(connector, instruction=instruction)
        if self.config.projector.reads_images:
            connector = functools.partial(connector, images=tuple(images))
        if self.config.projector.rowwise:
            project = functools.partial(encode.project_rows, self.projector)
        elif vision.native_sizes:
            project = functools.partial(encode.project_images, self.projector, tuple(grids))
        else:
            left_out = vision.leading_rows if vision.drops_class_row else 0
            project = functools.partial(encode.project_tiles, connector, vision.rows_per_tile, left_out)
        newline = self.image_newline if self.config.has_newline else None
        return encode.Parts(newline, project, self.projector.plain_linears)


def _selected(rows: Tensor, kept: Tensor, pooled: list[Tensor]) -> Tensor:
    """Parts.project of rows that are projected already."""
    return rows[kept]
