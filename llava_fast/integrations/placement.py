"""Where image rows go among the rows of a batch that a Hugging Face processor made: integers in, index columns out.

Shapes: B sequences of S tokens; rows are numbered b * S + s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llava_fast.errors import ImageError
from llava_fast.inputs.anyres import NEWLINE, VisualGeometry, image_rows
from llava_fast.inputs.plan import CONSTANT, IGNORE, TEXT, VISUAL, pack_columns, row_uses_columns
from llava_fast.ops.token_pack import RowUses


class Integers(NamedTuple):
    """What a batch says in integers, on the host: ids and labels int64 [B, S], sizes int64 [images, 2] as (height,
    width); None for what was not given."""

    ids: np.ndarray | None
    sizes: np.ndarray | None
    labels: np.ndarray | None = None


def read_integers(ids: Tensor | None, sizes, labels: Tensor | None = None) -> Integers:
    """The integers of a batch on the host: one copy, one synchronisation, if they are on a device."""
    given = [None if part is None else torch.as_tensor(part) for part in (ids, sizes, labels)]
    away = next((part.device for part in given if part is not None and part.device.type != "cpu"), None)
    if away is not None:
        flat = torch.cat([part.to(away).reshape(-1).long() for part in given if part is not None]).cpu()
        pieces = iter(flat.split([part.numel() for part in given if part is not None]))
        given = [None if part is None else next(pieces).view(part.shape) for part in given]
    return Integers(*(None if part is None else part.detach().long().numpy() for part in given))


class ImageRows(NamedTuple):
    """The rows of all images end to end, and how many tiles and rows each image has.

    newline bool [rows]; index int64 [rows]: the row among all tiles' kept rows that each is made of (0 for newlines).
    """

    newline: np.ndarray
    index: np.ndarray
    tiles: list[int]
    lengths: list[int]


def rows_of_images(geometry: VisualGeometry, sizes: np.ndarray | None, count: int) -> ImageRows:
    """Rows of `count` images; `sizes` [count, 2] is needed only for AnyRes. Raises ImageError for a size that the
    geometry cannot read."""
    if sizes is not None and len(sizes) != count:
        raise ImageError(f"{count} images, but {len(sizes)} image sizes")
    edge = geometry.tile_size
    each = [image_rows(geometry, *((edge, edge) if sizes is None else map(int, sizes[i]))) for i in range(count)]
    tiles = [rows.tiles for rows in each]
    first = np.cumsum([0, *tiles]) * geometry.rows_per_tile
    none = [np.zeros(0, np.int64)]
    newline = np.concatenate([*none, *(rows.kind for rows in each)]) == NEWLINE
    index = np.concatenate([*none, *(rows.index + start for rows, start in zip(each, first, strict=False))])
    return ImageRows(newline, np.where(newline, 0, index).astype(np.int64), tiles, [len(rows) for rows in each])


@dataclass(frozen=True)
class Placement:
    """Index columns on a device, int32 (see ops.token_pack): source, row [rows]; kept [kept] the tower's rows to
    project, the tower's class row counted; place [image rows] the rows that images take."""

    source: Tensor
    row: Tensor
    kept: Tensor
    place: Tensor
    uses: RowUses


def place_rows(
    images: ImageRows,
    ids: np.ndarray | None,
    image_token: int,
    tower_rows: tuple[int, int],
    read_table: bool,
    device: torch.device,
) -> Placement:
    """The placement that `placement_columns` describes, on a device; `read_table` as `placement` has it."""
    return placement(to_device(placement_columns(images, ids, image_token, tower_rows), device), read_table)


def placement_columns(
    images: ImageRows, ids: np.ndarray | None, image_token: int, tower_rows: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The int32 columns of a Placement and its uses, by name: image rows stand at the image tokens of `ids` in
    row-major order, or, with ids None, end to end; text rows are read from the embedding table by token id.

    tower_rows  (rows that the tower gives for a tile, how many of them come before the first that is kept).
    Raises ImageError if image tokens and image rows differ in number.
    """
    total = len(images.index)
    flat = np.full(total, image_token) if ids is None else ids.reshape(-1)
    place = np.flatnonzero(flat == image_token)
    if len(place) != total:
        raise ImageError(f"{len(place)} image tokens, but the images have {total} rows")
    source = np.full(len(flat), TEXT, np.int32)
    row = flat.astype(np.int32)
    source[place] = np.where(images.newline, CONSTANT, VISUAL)
    kept, number = np.unique(images.index[~images.newline], return_inverse=True)
    row[place[~images.newline]] = number
    row[place[images.newline]] = 0
    of_tile, skipped = tower_rows
    per_tile = of_tile - skipped
    columns = {
        "source": source,
        "row": row,
        "kept": (kept // per_tile * of_tile + skipped + kept % per_tile).astype(np.int32),
        "place": place.astype(np.int32),
    }
    return columns | row_uses_columns(columns, len(kept))


def placement(columns: Mapping[str, Tensor], read_table: bool) -> Placement:
    """A Placement of columns on a device, without a synchronisation. `read_table`: text rows are read from the
    embedding table by token id; False: from a table of all B * S rows, each at its own place."""
    source, row, kept, place = (columns[name] for name in ("source", "row", "kept", "place"))
    uses = RowUses(*(columns[name] for name in RowUses._fields))
    if not read_table:
        row = torch.where(source == TEXT, torch.arange(len(row), dtype=row.dtype, device=row.device), row)
        text = uses.text_row.sort().values
        segments = torch.arange(len(text) + 1, dtype=text.dtype, device=text.device)
        uses = uses._replace(text_row=text, text_token=text, text_segment=segments)
    return Placement(source, row, kept, place, uses)


def supervised_rows(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, targets) of labels [B, S]: the rows whose next token in the same sequence carries a label, and it."""
    following = labels[:, 1:]
    sequence, position = np.nonzero(following != IGNORE)
    return sequence * labels.shape[1] + position, following[sequence, position]


def to_device(columns: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Columns as int32 tensors on a device, moved in one copy without a synchronisation."""
    flat, sections = pack_columns(columns)
    moved = torch.from_numpy(flat)
    if device.type == "cuda":
        moved = moved.pin_memory().to(device, non_blocking=True)
    return {name: moved[start : start + int(np.prod(shape))].view(shape) for name, (start, shape) in sections.items()}
