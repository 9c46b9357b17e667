"""The integers of a call read from a device, and the columns that inputs.plan.from_ids makes of them put back on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llava_fast.inputs.plan.columns import TEXT, pack_columns
from llava_fast.inputs.plan.from_ids import Integers
from llava_fast.inputs.plan.visual_table import Mix
from llava_fast.ops import mix_rows
from llava_fast.ops.mix_rows import TapUses
from llava_fast.ops.token_pack import RowUses


def read_integers(ids: Tensor | None, sizes, labels: Tensor | None = None, counts=None) -> Integers:
    """The integers of a batch on the host: one copy, one synchronisation, if they are on a device."""
    given = [None if part is None else torch.as_tensor(part) for part in (ids, sizes, labels, counts)]
    away = next((part.device for part in given if part is not None and part.device.type != "cpu"), None)
    if away is not None:
        flat = torch.cat([part.to(away).reshape(-1).long() for part in given if part is not None]).cpu()
        pieces = iter(flat.split([part.numel() for part in given if part is not None]))
        given = [None if part is None else next(pieces).view(part.shape) for part in given]
    return Integers(*(None if part is None else part.detach().long().numpy() for part in given))


class MixTable(NamedTuple):
    """Visual rows made of others on a device: see inputs.plan.Mix and ops.mix_rows."""

    stage: str
    reduce: str
    index: Tensor
    weight: Tensor
    uses: TapUses | None

    def of(self, rows: Tensor) -> Tensor:
        return mix_rows(rows, self.index, self.weight, self.reduce, self.uses)


@dataclass(frozen=True)
class Placement:
    """Index columns on a device, int32 (see ops.token_pack): source, row [rows]; kept [kept] the tower's rows to
    project, the tower's class row counted; place, video_place the rows that images and videos take; mixes, whose rows
    follow the kept ones in the visual table."""

    source: Tensor
    row: Tensor
    kept: Tensor
    place: Tensor
    video_place: Tensor
    uses: RowUses
    mixes: tuple[MixTable, ...] = ()


def placement(columns: Mapping[str, Tensor], read_table: bool, mixes: Sequence[Mix] = ()) -> Placement:
    """A Placement of columns on a device, without a synchronisation. `read_table`: text rows are read from the
    embedding table by token id; False: from a table of all B * S rows, each at its own place."""
    source, row, kept, place = (columns[name] for name in ("source", "row", "kept", "place"))
    uses = RowUses(*(columns[name] for name in RowUses._fields))
    if not read_table:
        row = torch.where(source == TEXT, torch.arange(len(row), dtype=row.dtype, device=row.device), row)
        text = uses.text_row.sort().values
        segments = torch.arange(len(text) + 1, dtype=text.dtype, device=text.device)
        uses = uses._replace(text_row=text, text_token=text, text_segment=segments)
    tables = tuple(_mix_table(columns, mix) for mix in mixes)
    return Placement(source, row, kept, place, columns.get("video_place", place[:0]), uses, tables)


def _mix_table(columns: Mapping[str, Tensor], mix: Mix) -> MixTable:
    uses = TapUses(columns[mix.use], columns[mix.start]) if mix.use in columns else None
    return MixTable(mix.stage, mix.reduce, columns[mix.index], columns[mix.weight].view(torch.float32), uses)


def to_device(columns: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Columns as int32 tensors on a device, moved in one copy without a synchronisation."""
    flat, sections = pack_columns(columns)
    moved = torch.from_numpy(flat)
    if device.type == "cuda":
        moved = moved.pin_memory().to(device, non_blocking=True)
    return {name: moved[start : start + int(np.prod(shape))].view(shape) for name, (start, shape) in sections.items()}
