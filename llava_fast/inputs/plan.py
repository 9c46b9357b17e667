"""TokenPlan: where every decoder row of a batch comes from, as integers computed before any tensor exists.

Everything downstream follows the plan: which ViT rows are projected, where each lands, where text and newline
rows go, positions, labels, sequence boundaries. Its columns are views of one flat int32 array, so that a batch
ships to a device in one copy. Layout "packed" puts sequences end to end; "padded" gives each the same length with
filler rows (source -1) on the right.

A packed sequence may end in tails: other continuations of what comes before them, its prefix. Each tail's positions
start where the prefix ends, and no tail sees another, so two answers to one question share its rows (train.preference).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llava_fast.inputs.anyres import MIXED, NEWLINE, VisualRows

FILLER, TEXT, VISUAL, CONSTANT = -1, 0, 1, 2
"""Source tables: none, text embedding (row = token id), visual rows, constant rows (0 = newline)."""

MODALITY_TEXT, MODALITY_IMAGE, MODALITY_VIDEO = 0, 1, 2
IGNORE = -100
"""Label of a row that is not supervised (PyTorch's ignore_index)."""

Layout = Literal["packed", "padded"]
Stage = Literal["before", "after"]
Reduce = Literal["sum", "max"]


@dataclass(frozen=True)
class TextPiece:
    """Consecutive token ids of one sequence; `supervised` marks those that carry a label (None: none do)."""

    ids: np.ndarray
    supervised: np.ndarray | None = None


@dataclass(frozen=True)
class VisualPiece:
    """One image or video in its place among the text."""

    rows: VisualRows
    modality: int = MODALITY_IMAGE


Piece = TextPiece | VisualPiece


@dataclass(frozen=True)
class Mix:
    """Visual rows made by mixing others: how they reduce, at which stage, and the names of the columns of their tap
    table (index, weight) and of the same table sorted by the row a tap takes (use, start: see ops.mix_rows.TapUses;
    only a plan with labels has those two)."""

    stage: Stage
    reduce: Reduce
    index: str
    weight: str
    use: str
    start: str


@dataclass(frozen=True)
class TokenPlan:
    """The plan of a batch. `columns[name]` is an int32 view of `flat`:

    source, row, position, label, sequence, modality   [rows]  one entry per decoder row, fillers -1
    tile_of_kept, kept                                 [kept]  tile number and ViT row of each projected row, among
                                                       all rows that the tower gives
    last_row                                           [sequences]  the last real row of each sequence
    boundaries                                         [sequences + 1]  first row of each sequence, then the end
    supervised_row, supervised_target                  [supervised]  rows whose next token is a label, and it; a
                                                       prefix's last row is there once for each tail
    supervised_sequence, supervised_tail               [supervised]  only with tails: the sequence of each target, and
                                                       its tail, counted from 1 (0: the prefix)
    text_row, text_token, text_segment                 rows with text sorted by token id, the distinct ids, and
                                                       where each id's rows start (for deterministic gradients)
    visual_place                                       [visual rows]  the row that took each visual row, or -1
    constant_row, constant_segment                     rows with a newline, and [0, their number]

    The visual table that VISUAL rows index is: the kept rows, then each mix of stage "before", then each of stage
    "after". `lengths` counts the real rows of each sequence; `tiles` the tiles of the whole batch. `tails` holds the
    row counts of each sequence's tails; it is empty if no sequence has any.
    """

    layout: Layout
    lengths: tuple[int, ...]
    tiles: int
    rows: int
    mixes: tuple[Mix, ...]
    flat: np.ndarray
    sections: dict[str, tuple[int, tuple[int, ...]]]
    tails: tuple[tuple[int, ...], ...] = ()

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {name: self.column(name) for name in self.sections}

    def column(self, name: str) -> np.ndarray:
        start, shape = self.sections[name]
        return self.flat[start : start + int(np.prod(shape))].reshape(shape)

    @property
    def has_labels(self) -> bool:
        return self.sections["supervised_row"][1][0] > 0

    def with_columns(self, columns: dict[str, np.ndarray]) -> TokenPlan:
        """This plan and other int32 columns (floats as their bits) that travel with it."""
        flat, sections = pack_columns(self.columns | columns)
        return replace(self, flat=flat, sections=sections)


def sequence_length(pieces: list[Piece]) -> int:
    """Decoder rows one sequence takes."""
    return sum(len(piece.ids) if isinstance(piece, TextPiece) else len(piece.rows) for piece in pieces)


def build_plan(
    sequences: list[list[Piece]],
    tower_rows_per_tile: int,
    layout: Layout = "packed",
    first_positions: list[int] | None = None,
    tails: Sequence[Sequence[int]] = (),
) -> TokenPlan:
    """The plan of a batch of sequences, each a list of text and visual pieces in order.

    Tiles are numbered in the order in which visual pieces appear. `first_positions` gives each sequence's first
    position id (default 0): a chat turn continues where its cache ends. `tails` gives the row counts of the tails that
    each sequence ends in (packed only); what comes before them is the prefix, of at least one row.
    """
    if tails and layout != "packed":
        raise ValueError("only a packed plan can have tails")
    visual = VisualTable(tower_rows_per_tile)
    parts = [[_piece_columns(piece, visual) for piece in pieces] for pieces in sequences]
    training = any(isinstance(p, TextPiece) and p.supervised is not None for pieces in sequences for p in pieces)
    kept, mix_columns, mixes, number, visual_rows = visual.finish(training)

    lengths = tuple(sequence_length(pieces) for pieces in sequences)
    width = max(lengths, default=0)
    stride = [width] * len(lengths) if layout == "padded" else list(lengths)
    boundaries = np.concatenate([[0], np.cumsum(stride)]).astype(np.int32)
    total = int(boundaries[-1])
    columns = {
        "source": np.full(total, FILLER, np.int32),
        "row": np.full(total, -1, np.int32),
        "position": np.zeros(total, np.int32),
        "label": np.full(total, IGNORE, np.int32),
        "sequence": np.full(total, -1, np.int32),
        "modality": np.full(total, -1, np.int32),
    }
    tail_of, before = np.zeros(total, np.int32), np.arange(-1, total - 1, dtype=np.int32)
    for number_of, (pieces, start, length) in enumerate(zip(parts, boundaries[:-1], lengths, strict=True)):
        if not length:
            continue
        window = slice(int(start), int(start) + length)
        for column, name in enumerate(("source", "row", "label", "modality")):
            columns[name][window] = np.concatenate([piece[column] for piece in pieces])
        first = first_positions[number_of] if first_positions else 0
        of_sequence = tails[number_of] if tails else ()
        prefix = length - sum(of_sequence)
        if prefix < 1 and of_sequence:
            raise ValueError(f"sequence {number_of} has {length} rows and tails of {list(of_sequence)}: no prefix")
        position = [np.arange(prefix), *(np.arange(prefix, prefix + tail) for tail in of_sequence)]
        columns["position"][window] = first + np.concatenate(position)
        ends = start + prefix + np.cumsum([0, *of_sequence])
        for tail, (begin, end) in enumerate(zip(ends[:-1], ends[1:], strict=True), 1):
            tail_of[begin:end] = tail
            if begin < end:
                before[begin] = start + prefix - 1
        columns["sequence"][window] = number_of
    is_visual = columns["source"] == VISUAL
    columns["row"][is_visual] = number(columns["row"][is_visual])

    columns["kept"], columns["tile_of_kept"] = kept, kept // max(tower_rows_per_tile, 1)
    columns["boundaries"] = boundaries
    columns["last_row"] = np.array([s + n - 1 for s, n in zip(boundaries[:-1], lengths, strict=True)], np.int32)
    columns |= (
        _supervision(columns, before, tail_of if tails else None) | row_uses_columns(columns, visual_rows) | mix_columns
    )
    flat, sections = pack_columns(columns)
    each = tuple(tuple(int(tail) for tail in of_sequence) for of_sequence in tails)
    return TokenPlan(layout, lengths, visual.tiles, total, mixes, flat, sections, each)


def _piece_columns(piece: Piece, visual: VisualTable) -> tuple[np.ndarray, ...]:
    """(source, row, label, modality) of one piece; visual rows are numbered provisionally (see VisualTable)."""
    if isinstance(piece, TextPiece):
        ids = np.asarray(piece.ids, dtype=np.int32)
        label = np.full(len(ids), IGNORE, np.int32)
        if piece.supervised is not None:
            label = np.where(piece.supervised, ids, IGNORE).astype(np.int32)
        return np.full(len(ids), TEXT, np.int32), ids, label, np.full(len(ids), MODALITY_TEXT, np.int32)
    newline = piece.rows.kind == NEWLINE
    source = np.where(newline, CONSTANT, VISUAL).astype(np.int32)
    row = np.where(newline, 0, visual.add(piece.rows)).astype(np.int32)
    return source, row, np.full(len(row), IGNORE, np.int32), np.full(len(row), piece.modality, np.int32)


class VisualTable:
    """Collects the visual rows of a batch and numbers them: kept ViT rows first, then the mixes by stage.

    Until `finish` knows how many rows each part holds, a direct row is its ViT row number and a mixed row is
    negative: -(1 + mix * LIMIT + row of that mix).
    """

    LIMIT = 1 << 26

    def __init__(self, tower_rows_per_tile: int) -> None:
        self.tower_rows_per_tile = tower_rows_per_tile
        self.tiles = 0
        self.direct: list[np.ndarray] = []
        self.mixed: dict[tuple[Stage, Reduce, int], list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, rows: VisualRows) -> np.ndarray:
        first = self.tiles * self.tower_rows_per_tile
        self.tiles += rows.tiles
        index = rows.index.astype(np.int64)
        is_mixed = rows.kind == MIXED
        provisional = index + first
        if rows.taps is not None:
            taps, weight = rows.taps
            key = (rows.stage, rows.reduce, taps.shape[1])
            tables = self.mixed.setdefault(key, [])
            done = sum(len(table) for table, _ in tables)
            tables.append((taps + first, weight))
            number = list(self.mixed).index(key)
            provisional = np.where(is_mixed, -(1 + number * self.LIMIT + done + index), provisional)
        self.direct.append(provisional[(rows.kind != NEWLINE) & ~is_mixed])
        return provisional

    def finish(self, with_uses: bool):
        """(kept ViT rows, columns of the mixes, mixes in table order, provisional -> final numbers, rows in all)."""
        needed = [
            *self.direct,
            *(t.ravel() for k, ts in self.mixed.items() if k[0] == "after" for t, _ in ts),
        ]
        kept = np.unique(np.concatenate(needed)) if needed else np.zeros(0, np.int64)
        order = sorted(self.mixed, key=lambda key: key[0] != "before")
        start, size = {}, len(kept)
        before = sum(len(t) for k, ts in self.mixed.items() if k[0] == "before" for t, _ in ts)
        mixes: list[Mix] = []
        columns: dict[str, np.ndarray] = {}
        for key in order:
            stage, reduce, _ = key
            index = np.concatenate([table for table, _ in self.mixed[key]])
            weight = np.concatenate([weight for _, weight in self.mixed[key]]).astype(np.float32)
            if stage == "after":
                index = np.searchsorted(kept, index)
            name = f"mix{len(mixes)}"
            mix = Mix(stage, reduce, f"{name}_index", f"{name}_weight", f"{name}_use", f"{name}_start")
            sources = len(kept) + before if stage == "after" else self.tiles * self.tower_rows_per_tile
            columns |= {mix.index: index.astype(np.int32), mix.weight: weight.view(np.int32)}
            if with_uses:
                use = np.argsort(index, axis=None, kind="stable").astype(np.int32)
                ends = np.cumsum(np.bincount(index.ravel(), minlength=sources))
                columns |= {mix.use: use, mix.start: np.append(0, ends).astype(np.int32)}
            mixes.append(mix)
            start[list(self.mixed).index(key)] = size
            size += len(index)

        def number(provisional: np.ndarray) -> np.ndarray:
            mixed = -provisional.astype(np.int64) - 1
            final = np.searchsorted(kept, np.maximum(provisional, 0)).astype(np.int64)
            for which, first in start.items():
                inside = (provisional < 0) & (mixed // self.LIMIT == which)
                final[inside] = first + mixed[inside] % self.LIMIT
            return final.astype(np.int32)

        return kept.astype(np.int32), columns, tuple(mixes), number, size


def _supervision(
    columns: dict[str, np.ndarray], before: np.ndarray, tail_of: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Rows that predict a labelled token: the row before it in the same sequence. before, tail_of: int32 [rows], the
    row that a row follows and the number of its tail."""
    label, sequence = columns["label"], columns["sequence"]
    at = np.flatnonzero(label != IGNORE)
    at = at[(before[at] >= 0) & (sequence[before[at]] == sequence[at])]
    found = {"supervised_row": before[at], "supervised_target": label[at]}
    if tail_of is not None:
        found |= {"supervised_sequence": sequence[at], "supervised_tail": tail_of[at]}
    return found


def row_uses_columns(columns: dict[str, np.ndarray], visual_rows: int) -> dict[str, np.ndarray]:
    """The placement that columns "source" and "row" give, the other way round (see ops.token_pack.RowUses)."""
    return _text_segments(columns) | _other_uses(columns, visual_rows)


def _text_segments(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Text rows sorted by token id (stably), the distinct ids, and the start of each id's segment, then the end."""
    rows = np.flatnonzero(columns["source"] == TEXT).astype(np.int32)
    order = np.argsort(columns["row"][rows], kind="stable")
    tokens, first = np.unique(columns["row"][rows][order], return_index=True)
    return {
        "text_row": rows[order],
        "text_token": tokens.astype(np.int32),
        "text_segment": np.append(first, len(rows)).astype(np.int32),
    }


def _other_uses(columns: dict[str, np.ndarray], visual_rows: int) -> dict[str, np.ndarray]:
    """Which decoder row took each visual row (at most one does), and the rows of the one constant."""
    taken = np.flatnonzero(columns["source"] == VISUAL).astype(np.int32)
    place = np.full(visual_rows, -1, np.int32)
    place[columns["row"][taken]] = taken
    constant = np.flatnonzero(columns["source"] == CONSTANT).astype(np.int32)
    return {
        "visual_place": place,
        "constant_row": constant,
        "constant_segment": np.array([0, len(constant)], np.int32),
    }


def pack_columns(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, tuple[int, tuple[int, ...]]]]:
    """One flat int32 array and where each column lies in it; every column starts on a 16-byte boundary."""
    sections, start = {}, 0
    for name, column in columns.items():
        sections[name] = (start, column.shape)
        start += -(-column.size // 4) * 4
    flat = np.zeros(start, np.int32)
    for name, column in columns.items():
        first = sections[name][0]
        flat[first : first + column.size] = column.ravel()
    return flat, sections
