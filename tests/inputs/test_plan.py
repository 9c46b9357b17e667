"""TokenPlan: its invariants on random batches, supervision, text segments, layouts, and the empty cases."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.inputs.plan.columns import (
    CONSTANT,
    IGNORE,
    MODALITY_IMAGE,
    MODALITY_TEXT,
    MODALITY_VIDEO,
    PADDING,
    TEXT,
    VISUAL,
)
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan, sequence_length
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows
from llava_fast.inputs.tiling.rows import FEATURE, NEWLINE
from llava_fast.inputs.tiling.video import video_rows

GRID = tuple((28 * h, 28 * w) for h in range(1, 4) for w in range(1, 4))
UNPAD = VisualGeometry(28, 7, "anyres", GRID, "hf", "spatial_unpad", video_pool="average", video_newline="frame")
SHRUNK = VisualGeometry(
    28, 7, "anyres", GRID, "hf", "spatial_unpad", max_tiles=1, video_pool="bilinear", video_pool_stage="after"
)
POOLED = VisualGeometry(28, 7, "anyres", GRID, "llava", "spatial_maxpool2x2", video_pool="max")
GEOMETRIES = [UNPAD, SHRUNK, POOLED, *(dataclasses.replace(g, dropped_rows=1) for g in (UNPAD, SHRUNK, POOLED))]


def text_piece(draw_supervised: bool):
    def build(pairs):
        ids = np.array([i for i, _ in pairs], np.int32)
        return TextPiece(ids, np.array([s for _, s in pairs], bool) if draw_supervised else None)

    return st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=8).map(build)


def visual_piece(geometry):
    side = st.integers(1, 120)
    image = st.tuples(side, side).map(lambda s: VisualPiece(image_rows(geometry, *s)))
    video = st.integers(1, 4).map(lambda n: VisualPiece(video_rows(geometry, n), MODALITY_VIDEO))
    return st.one_of(image, image, video)


@st.composite
def batches(draw):
    """(geometry, sequences): text-only, many-image and interleaved sequences together, some of them empty."""
    geometry = draw(st.sampled_from(GEOMETRIES))
    piece = st.one_of(text_piece(False), text_piece(True), visual_piece(geometry))
    return geometry, draw(st.lists(st.lists(piece, max_size=5), max_size=4))


def sources_of(plan, geometry):
    """Per row, a token naming what is really there, independent of how the plan numbers its table."""
    source, row = plan.column("source"), plan.column("row")
    kept = plan.column("kept").tolist()
    table = [("vit", k) for k in kept]
    for pool in plan.pools:
        index, weight = plan.column(pool.index), plan.column(pool.weight).view(np.float32)
        for taps, weights in zip(index.tolist(), weight.tolist(), strict=True):
            origin = [kept[t] for t in taps] if pool.stage == "after" else taps
            table.append((pool.stage, pool.reduce, tuple(origin), tuple(weights)))
    names = {PADDING: lambda r: None, TEXT: lambda r: ("text", r), CONSTANT: lambda r: ("newline", r)}
    names[VISUAL] = lambda r: table[r]
    return [names[s](r) for s, r in zip(source.tolist(), row.tolist(), strict=True)]


def expected_sources(sequences, geometry):
    """The same for the pieces themselves, sequence by sequence."""
    first_tile, out = 0, []
    for pieces in sequences:
        rows = []
        for piece in pieces:
            if isinstance(piece, TextPiece):
                rows += [("text", int(i)) for i in piece.ids]
                continue
            visual, first = piece.rows, first_tile * geometry.tower_rows_per_tile
            for kind, index in zip(visual.kind.tolist(), visual.index.tolist(), strict=True):
                if kind == NEWLINE:
                    rows.append(("newline", 0))
                elif kind == FEATURE:
                    rows.append(("vit", index + first))
                else:
                    taps, weight = visual.pooling
                    origin = tuple(int(t) + first for t in taps[index])
                    weights = tuple(float(w) for w in weight[index])
                    rows.append((visual.stage, visual.reduce, origin, weights))
            first_tile += visual.tiles
        out.append(rows)
    return out, first_tile


@settings(max_examples=120)
@given(batches(), st.sampled_from(["packed", "padded"]))
def test_every_row_comes_from_where_its_piece_says(batch, layout):
    geometry, sequences = batch
    plan = build_plan(sequences, geometry.tower_rows_per_tile, layout)
    expected, tiles = expected_sources(sequences, geometry)
    assert plan.tiles == tiles
    assert plan.lengths == tuple(len(rows) for rows in expected)
    assert plan.lengths == tuple(sequence_length(pieces) for pieces in sequences)
    found, starts = sources_of(plan, geometry), plan.column("boundaries").tolist()
    width = max(plan.lengths, default=0)
    assert len(starts) == len(sequences) + 1
    assert starts[-1] == plan.rows == len(found)
    for number, rows in enumerate(expected):
        start, end = starts[number], starts[number + 1]
        assert end - start == (width if layout == "padded" else len(rows))
        assert found[start : start + len(rows)] == rows
        assert all(name is None for name in found[start + len(rows) : end])


@settings(max_examples=120)
@given(batches(), st.sampled_from(["packed", "padded"]))
def test_invariants(batch, layout):
    geometry, sequences = batch
    plan = build_plan(sequences, geometry.tower_rows_per_tile, layout)
    columns = plan.columns
    kept = columns["kept"]
    assert (np.diff(kept) > 0).all()
    assert (kept >= 0).all()
    assert (kept < plan.tiles * geometry.tower_rows_per_tile).all()
    assert (columns["tile_of_kept"] == kept // geometry.tower_rows_per_tile).all()
    table = len(kept) + sum(len(columns[pool.index]) for pool in plan.pools)
    source, row = columns["source"], columns["row"]
    assert ((row >= 0) == (source != PADDING)).all()
    assert (row[source == VISUAL] < table).all()
    assert (row[source == CONSTANT] == 0).all()
    for pool in plan.pools:
        bound = len(kept) if pool.stage == "after" else plan.tiles * geometry.tower_rows_per_tile
        assert (columns[pool.index] >= 0).all()
        assert (columns[pool.index] < bound).all()
        assert pool.reduce == "max" or np.allclose(columns[pool.weight].view(np.float32).sum(1), 1, atol=1e-6)
    # Every projected row is used: directly, or by a pool made after the projector.
    used = [row[source == VISUAL], *(columns[m.index].ravel() for m in plan.pools if m.stage == "after")]
    assert set(range(len(kept))) <= set(np.concatenate(used).tolist())
    real = source != PADDING
    for number, (start, length) in enumerate(zip(columns["boundaries"][:-1], plan.lengths, strict=True)):
        mine = np.flatnonzero(columns["sequence"] == number)
        assert mine.tolist() == list(range(start, start + length))
        assert columns["position"][mine].tolist() == list(range(length))
        assert columns["last_row"][number] == start + length - 1
    assert (columns["sequence"][~real] == -1).all()
    assert (columns["modality"][~real] == -1).all()
    assert ((columns["modality"] == MODALITY_TEXT) == (source == TEXT)).all()
    for column, (start, shape) in plan.sections.items():
        assert start % 4 == 0
        assert columns[column].base is not None
        assert columns[column].shape == shape
        assert columns[column].dtype == np.int32


@settings(max_examples=120)
@given(batches(), st.sampled_from(["packed", "padded"]))
def test_supervision_is_the_usual_shift_within_each_sequence(batch, layout):
    geometry, sequences = batch
    plan = build_plan(sequences, geometry.tower_rows_per_tile, layout)
    rows, targets = [], []
    for start, pieces in zip(plan.column("boundaries").tolist()[:-1], sequences, strict=True):
        label = []
        for piece in pieces:
            if isinstance(piece, TextPiece) and piece.supervised is not None:
                label += [int(i) if s else IGNORE for i, s in zip(piece.ids, piece.supervised, strict=True)]
            else:
                label += [IGNORE] * sequence_length([piece])
        # transformers: shift_labels = labels padded on the right by IGNORE, then [1:]
        shifted = [*label, IGNORE][1:]
        rows += [start + i for i, target in enumerate(shifted) if target != IGNORE]
        targets += [target for target in shifted if target != IGNORE]
        assert plan.column("label")[start : start + len(label)].tolist() == label
    assert plan.column("supervised_row").tolist() == rows
    assert plan.column("supervised_target").tolist() == targets
    assert plan.has_labels == bool(rows)


@settings(max_examples=60)
@given(batches())
def test_text_segments_sort_the_text_rows_by_token(batch):
    geometry, sequences = batch
    plan = build_plan(sequences, geometry.tower_rows_per_tile)
    rows, tokens, segments = (plan.column(name) for name in ("text_row", "text_token", "text_segment"))
    assert sorted(rows.tolist()) == np.flatnonzero(plan.column("source") == TEXT).tolist()
    assert (np.diff(tokens) > 0).all()
    assert len(segments) == len(tokens) + 1
    assert segments[-1] == len(rows)
    for number, token in enumerate(tokens):
        mine = rows[segments[number] : segments[number + 1]]
        assert len(mine)
        assert (np.diff(mine) > 0).all()
        assert (plan.column("row")[mine] == token).all()


@settings(max_examples=60)
@given(batches())
def test_packed_and_padded_hold_the_same_sequences(batch):
    geometry, sequences = batch
    packed, padded = (build_plan(sequences, geometry.tower_rows_per_tile, layout) for layout in ("packed", "padded"))
    assert packed.lengths == padded.lengths
    assert packed.pools == padded.pools
    for name in ("kept", "supervised_target", "text_token", "text_segment", *(m.index for m in packed.pools)):
        assert (packed.column(name) == padded.column(name)).all()
    a, b = packed.column("boundaries"), padded.column("boundaries")
    for number, length in enumerate(packed.lengths):
        for name in ("source", "row", "position", "label", "sequence", "modality"):
            mine = packed.column(name)[a[number] : a[number] + length]
            assert (mine == padded.column(name)[b[number] : b[number] + length]).all()
    assert (packed.column("source") != PADDING).all()


def test_positions_start_where_told():
    text = TextPiece(np.arange(3, dtype=np.int32))
    plan = build_plan([[text], [text]], 16, first_positions=[5, 0])
    assert plan.column("position").tolist() == [5, 6, 7, 0, 1, 2]


def test_modalities_are_told_apart():
    pieces = [
        VisualPiece(image_rows(UNPAD, 28, 28)),
        TextPiece(np.array([7])),
        VisualPiece(video_rows(UNPAD, 1), MODALITY_VIDEO),
    ]
    modality = build_plan([pieces], UNPAD.tower_rows_per_tile).column("modality").tolist()
    image, video = len(pieces[0].rows), len(pieces[2].rows)
    assert modality == [MODALITY_IMAGE] * image + [MODALITY_TEXT] + [MODALITY_VIDEO] * video


def test_the_first_token_of_a_sequence_is_never_a_target():
    """Its predecessor belongs to another sequence."""
    all_supervised = TextPiece(np.array([4, 5], np.int32), np.array([True, True]))
    for layout in ("packed", "padded"):
        plan = build_plan([[all_supervised], [all_supervised]], 16, layout)
        assert plan.column("supervised_row").tolist() == [0, 2]
        assert plan.column("supervised_target").tolist() == [5, 5]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_empty_batches_and_sequences(layout):
    nothing = build_plan([], 16, layout)
    assert nothing.rows == nothing.tiles == 0
    assert nothing.lengths == ()
    assert not nothing.has_labels
    empty_first = build_plan([[], [TextPiece(np.array([3]))]], 16, layout)
    assert empty_first.lengths == (0, 1)
    assert empty_first.tiles == 0
    assert empty_first.column("kept").tolist() == []
    assert empty_first.column("sequence").tolist() == ([1] if layout == "packed" else [-1, 1])
