"""TokenPlan: where every decoder row of a batch comes from, as integers computed before any tensor exists.

The plan determines everything downstream: which ViT rows are projected, the places of visual, text and newline
rows, positions, labels, sequence boundaries. Its columns are views of one flat int32 array, so that a batch is copied
to a device in one transfer. Layout "packed" concatenates sequences; "padded" gives all the same length, with padding
rows (source -1) on the right.

A packed sequence may end in branches: alternative continuations of a common prefix. The positions of each branch start
where the prefix ends, and branches do not attend to each other, so two answers to one question share the question's
rows (train.data.pairs).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llava_fast.inputs.plan.columns import (
    CONSTANT,
    IGNORE,
    MODALITY_IMAGE,
    MODALITY_TEXT,
    MODALITY_VIDEO,
    PADDING,
    TEXT,
    VISUAL,
    pack_columns,
)
from llava_fast.inputs.plan.inverse import inverse_columns
from llava_fast.inputs.plan.visual_table import Pool, VisualTable
from llava_fast.inputs.tiling.rows import FEATURE, NEWLINE, POOLED, TOKEN, UNKNOWN_TOKEN, VisualRows

Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class TextPiece:
    """Consecutive token ids of one sequence; `supervised` marks those with a label (None: none). `begins_answer`: in an
    encoder-decoder, the encoder reads the rows before this piece, and the decoder those from here on."""

    ids: np.ndarray
    supervised: np.ndarray | None = None
    begins_answer: bool = False


@dataclass(frozen=True)
class VisualPiece:
    """One image or video of a sequence. `instruction`: int32 ids of the text that the connector reads with its tiles,
    in the connector's vocabulary, or a router, in the decoder's."""

    rows: VisualRows
    modality: int = MODALITY_IMAGE
    instruction: np.ndarray | None = None


Piece = TextPiece | VisualPiece


@dataclass(frozen=True)
class TokenPlan:
    """The plan of a batch. `columns[name]` is an int32 view of `flat`:

    source, row, position, label, sequence, modality   [rows]  one entry per decoder row, padding -1
    tile_of_kept, kept                                 [kept]  tile number and ViT row of each projected row, among
                                                       all rows of the tower's output
    last_row                                           [sequences]  the last real row of each sequence
    boundaries                                         [sequences + 1]  first row of each sequence, then the end
    supervised_row, supervised_target                  [supervised]  rows whose next token has a label, and the labels;
                                                       a prefix's last row occurs once per branch
    supervised_sequence, supervised_branch             [supervised]  only with branches: the sequence of each target,
                                                       and its branch, counted from 1 (0: the prefix)
    text_row, text_token, text_segment                 rows with text sorted by token id, the distinct ids, and the
                                                       start of each id's rows (for deterministic gradients)
    visual_place                                       [visual rows]  the row that reads each visual row, or -1
    constant_row, constant_segment                     rows with a newline, and [0, their number]
    instruction                                        [tiles, longest]  only for a connector or router that reads text:
                                                       the ids that it reads with each tile, padding -1
    tower_tile                                         [tiles]  only if an image occurs several times before such a
                                                       connector: which of the batch's tiles it reads for each
    optional_row, optional_image                       rows that a router may leave out (models.router), and the image
                                                       of each, by its number; only if there are any

    VISUAL rows index the visual table: the kept rows, then each pool of stage "before", then each of stage "after".
    `lengths` counts the real rows of each sequence, `tiles` the tiles of the batch. `branches` has the row counts of
    each sequence's branches; it is empty if no sequence has branches. `grids` has the (rows, columns) of each image of
    native size, whose patches are the tiles, in order; empty if all tiles have one size. `images` has the number of
    tiles of each image and video, `videos` the (first, end) of each video's tiles. `encoded` counts each sequence's
    first rows that an encoder reads; empty without an encoder.
    """

    layout: Layout
    lengths: tuple[int, ...]
    tiles: int
    rows: int
    pools: tuple[Pool, ...]
    flat: np.ndarray
    sections: dict[str, tuple[int, tuple[int, ...]]]
    branches: tuple[tuple[int, ...], ...] = ()
    grids: tuple[tuple[int, int], ...] = ()
    videos: tuple[tuple[int, int], ...] = ()
    encoded: tuple[int, ...] = ()
    images: tuple[int, ...] = ()

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {name: self.column(name) for name in self.sections}

    def column(self, name: str) -> np.ndarray:
        start, shape = self.sections[name]
        return self.flat[start : start + int(np.prod(shape))].reshape(shape)

    @property
    def tower_tiles(self) -> int:
        """The tiles of the batch on which the tower runs; fewer than `tiles` if an image occurs several times."""
        return int(self.column("tower_tile").max()) + 1 if "tower_tile" in self.sections else self.tiles

    @property
    def has_labels(self) -> bool:
        return self.sections["supervised_row"][1][0] > 0

    def with_columns(self, columns: dict[str, np.ndarray]) -> TokenPlan:
        """This plan with additional int32 columns (float32 reinterpreted as int32)."""
        flat, sections = pack_columns(self.columns | columns)
        return replace(self, flat=flat, sections=sections)


def sequence_length(pieces: list[Piece]) -> int:
    """The number of decoder rows of one sequence."""
    return sum(len(piece.ids) if isinstance(piece, TextPiece) else len(piece.rows) for piece in pieces)


def encoded_rows(pieces: Sequence[Piece]) -> int:
    """The rows of one sequence that an encoder reads: those before its answer begins; 0 without an encoder."""
    begin = next((i for i, piece in enumerate(pieces) if isinstance(piece, TextPiece) and piece.begins_answer), 0)
    return sequence_length(list(pieces[:begin]))


def build_plan(
    sequences: list[list[Piece]],
    tower_rows_per_tile: int,
    layout: Layout = "packed",
    first_positions: list[int] | None = None,
    branches: Sequence[Sequence[int]] = (),
) -> TokenPlan:
    """The plan of a batch of sequences, each a list of text and visual pieces in order.

    Tiles are numbered in the order of the visual pieces. first_positions: each sequence's first position id (default
    0), for a chat turn that continues a cache. branches: the row counts of the branches at the end of each sequence
    (packed only); the rows before them, at least one, are the prefix.
    """
    if branches and layout != "packed":
        raise ValueError("only a packed plan can have branches")
    visual = VisualTable(tower_rows_per_tile)
    parts = [[_piece_columns(piece, visual) for piece in pieces] for pieces in sequences]
    training = any(isinstance(p, TextPiece) and p.supervised is not None for pieces in sequences for p in pieces)
    kept, pool_columns, pools, number, visual_rows = visual.finish(training)

    lengths = tuple(sequence_length(pieces) for pieces in sequences)
    width = max(lengths, default=0)
    stride = [width] * len(lengths) if layout == "padded" else list(lengths)
    boundaries = np.concatenate([[0], np.cumsum(stride)]).astype(np.int32)
    total = int(boundaries[-1])
    columns = {
        "source": np.full(total, PADDING, np.int32),
        "row": np.full(total, -1, np.int32),
        "position": np.zeros(total, np.int32),
        "label": np.full(total, IGNORE, np.int32),
        "sequence": np.full(total, -1, np.int32),
        "modality": np.full(total, -1, np.int32),
    }
    branch_of, before = np.zeros(total, np.int32), np.arange(-1, total - 1, dtype=np.int32)
    for number_of, (pieces, start, length) in enumerate(zip(parts, boundaries[:-1], lengths, strict=True)):
        if not length:
            continue
        window = slice(int(start), int(start) + length)
        for column, name in enumerate(("source", "row", "label", "modality")):
            columns[name][window] = np.concatenate([piece[column] for piece in pieces])
        first = first_positions[number_of] if first_positions else 0
        of_sequence = branches[number_of] if branches else ()
        prefix = length - sum(of_sequence)
        if prefix < 1 and of_sequence:
            raise ValueError(f"sequence {number_of} has {length} rows and branches of {list(of_sequence)}: no prefix")
        position = [np.arange(prefix), *(np.arange(prefix, prefix + branch) for branch in of_sequence)]
        columns["position"][window] = first + np.concatenate(position)
        ends = start + prefix + np.cumsum([0, *of_sequence])
        for branch, (begin, end) in enumerate(itertools.pairwise(ends), 1):
            branch_of[begin:end] = branch
            if begin < end:
                before[begin] = start + prefix - 1
        columns["sequence"][window] = number_of
    is_visual = columns["source"] == VISUAL
    columns["row"][is_visual] = number(columns["row"][is_visual])

    columns["kept"], columns["tile_of_kept"] = kept, kept // max(tower_rows_per_tile, 1)
    columns["boundaries"] = boundaries
    columns["last_row"] = np.array([s + n - 1 for s, n in zip(boundaries[:-1], lengths, strict=True)], np.int32)
    columns |= (
        _supervision(columns, before, branch_of if branches else None)
        | inverse_columns(columns, visual_rows)
        | pool_columns
    )
    instructed = [piece for pieces in sequences for piece in pieces if isinstance(piece, VisualPiece)]
    if any(piece.instruction is not None for piece in instructed):
        columns["instruction"] = _instructions(instructed)
    columns |= _optional(sequences, boundaries)
    flat, sections = pack_columns(columns)
    encoded = tuple(map(encoded_rows, sequences))
    return TokenPlan(
        layout,
        lengths,
        visual.tiles,
        total,
        pools,
        flat,
        sections,
        branches=tuple(tuple(int(branch) for branch in of_sequence) for of_sequence in branches),
        grids=tuple(visual.grids),
        videos=tuple(visual.videos),
        encoded=encoded if any(encoded) else (),
        images=tuple(visual.images),
    )


_SOURCE_OF = np.empty(4, np.int32)
_SOURCE_OF[[FEATURE, POOLED, NEWLINE, TOKEN]] = VISUAL, VISUAL, CONSTANT, TEXT


def _piece_columns(piece: Piece, visual: VisualTable) -> tuple[np.ndarray, ...]:
    """(source, row, label, modality) of one piece; visual rows have provisional numbers (see VisualTable)."""
    if isinstance(piece, TextPiece):
        ids = np.asarray(piece.ids, dtype=np.int32)
        label = np.full(len(ids), IGNORE, np.int32)
        if piece.supervised is not None:
            label = np.where(piece.supervised, ids, IGNORE).astype(np.int32)
        return np.full(len(ids), TEXT, np.int32), ids, label, np.full(len(ids), MODALITY_TEXT, np.int32)
    rows = piece.rows
    source = _SOURCE_OF[rows.kind]
    row = np.where(source == VISUAL, visual.add(rows, piece.modality == MODALITY_VIDEO), 0).astype(np.int32)
    modality = np.full(len(row), piece.modality, np.int32)
    is_token = rows.kind == TOKEN
    if is_token.any():
        row[is_token], modality[is_token] = rows.token_ids, MODALITY_TEXT
        if UNKNOWN_TOKEN in rows.token_ids:
            raise ValueError("the ids of tokens around tiles are not known: make the geometry with Family.geometry")
    return source, row, np.full(len(row), IGNORE, np.int32), modality


def _optional(sequences: list[list[Piece]], boundaries: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of optional rows, if there are any."""
    rows: list[np.ndarray] = []
    images: list[np.ndarray] = []
    number = 0
    for pieces, start in zip(sequences, boundaries[:-1].tolist(), strict=True):
        at = start
        for piece in pieces:
            if isinstance(piece, VisualPiece):
                if piece.rows.optional is not None:
                    rows.append(np.flatnonzero(piece.rows.optional) + at)
                    images.append(np.full(len(rows[-1]), number))
                number += 1
            at += sequence_length([piece])
    if not rows:
        return {}
    return {
        "optional_row": np.concatenate(rows).astype(np.int32),
        "optional_image": np.concatenate(images).astype(np.int32),
    }


def _instructions(pieces: list[VisualPiece]) -> np.ndarray:
    texts = [np.zeros(0, np.int32) if piece.instruction is None else piece.instruction for piece in pieces]
    longest = max(map(len, texts))
    rows = [np.pad(ids.astype(np.int32), (0, longest - len(ids)), constant_values=PADDING) for ids in texts]
    return np.repeat(np.stack(rows), [piece.rows.tiles for piece in pieces], axis=0)


def _supervision(
    columns: dict[str, np.ndarray], before: np.ndarray, branch_of: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The columns of rows that predict a labelled token, that is of the row before it in the same sequence. before,
    branch_of: int32 [rows], the preceding row of each row, and its branch."""
    label, sequence = columns["label"], columns["sequence"]
    at = np.flatnonzero(label != IGNORE)
    at = at[(before[at] >= 0) & (sequence[before[at]] == sequence[at])]
    found = {"supervised_row": before[at], "supervised_target": label[at]}
    if branch_of is not None:
        found |= {"supervised_sequence": sequence[at], "supervised_branch": branch_of[at]}
    return found
