"""A batch on a device: uint8 tiles and the plan's integers, transferred in one copy each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llava_fast.inputs.pictures.tiles import UncutImages
from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.prepared import Prepared
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.paged_cache import BlockTable
from llava_fast.models.placement import Placement
from llava_fast.ops.image import TilePlan, image_tiles


@dataclass(frozen=True)
class Batch:
    """The input of `model(batch)`. tiles: uint8 [tiles, 3, H, W], or float if already normalised; flat: the plan's
    columns on the device."""

    tiles: Tensor
    plan: TokenPlan
    flat: Tensor

    @classmethod
    def from_prepared(cls, prepared: Prepared, device: torch.device | str = "cpu") -> Batch:
        """Wrap host arrays as tensors (pinned on the way to a GPU); images not cut yet are cut on the device."""

        def moved(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor

        uncut = prepared.tiles
        if isinstance(uncut, UncutImages):
            tile_plan = TilePlan(moved(uncut.plan.jobs), moved(uncut.plan.words), *uncut.plan[2:])
            tiles = image_tiles(moved(uncut.pixels), tile_plan)
        else:
            tiles = moved(uncut)
        return cls(tiles, prepared.plan, moved(prepared.plan.flat))

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.tiles.to(device), self.plan, self.flat.to(device))

    def column(self, name: str) -> Tensor:
        """A column of the plan (see TokenPlan) on the device, int32."""
        start, shape = self.plan.sections[name]
        return self.flat[start : start + torch.Size(shape).numel()].view(shape)

    def count(self, what: Literal["tile", "kept"]) -> Tensor | None:
        """How many of the tiles or kept rows are real, int32 [1] on the device, in a batch padded to a bucket
        (inputs.plan.buckets); else None: all are.
        """
        name = f"{what}_count"
        return self.column(name) if name in self.plan.sections else None

    def weight(self, name: str) -> Tensor:
        """A float32 column, stored bit for bit among the integers."""
        return self.column(name).view(torch.float32)

    def placement(self) -> Placement:
        """The placement of the decoder's rows."""
        sections = self.plan.sections
        return Placement.of(lambda name: self.column(name) if name in sections else None, self.plan.pools)

    def spans(self, tables: tuple[BlockTable, ...] = ()) -> Spans:
        """Sequence boundaries for attention; with a cache, the table of each sequence's cached rows."""
        plan = self.plan
        starts = tuple(int(start) for start in plan.column("boundaries")[:-1])
        count = len(plan.lengths)
        dense = (count, plan.rows // count) if count and plan.rows and plan.layout == "padded" else None
        before = tuple(table.length for table in tables)
        return Spans(starts, plan.lengths, tables, before, dense, plan.branches, plan.encoded)
