"""A plan without some rows is the plan of the same pieces without them."""

import numpy as np
import pytest

from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.plan.routed import without_rows
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows
from llava_fast.inputs.tiling.canvas import CanvasTiling

GEOMETRY = VisualGeometry(32, 8, tiling=CanvasTiling(2, routed=True, separator=(7,)))
SIZES = [(30, 62), (90, 40), (20, 20)]


def text(*ids, answers=()):
    return TextPiece(np.array(ids, np.int32), np.isin(ids, answers))


def sequences(choose):
    """Pieces of three sequences; `choose` gives the rows that stay of an image."""
    images = [image_rows(GEOMETRY, *size) for size in SIZES]
    a, b, c = (VisualPiece(rows.only(choose(rows)) if choose else rows) for rows in images)
    return [[text(1, 2), a, text(3, 4, answers=(3, 4))], [text(5, 6, answers=(6,))], [b, text(3), c]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("last", [False, True])
def test_it_equals_the_plan_of_fewer_rows(layout, last):
    """Also where a label's row stands directly after a row that is left out (`last`)."""
    random = np.random.default_rng(0)
    chosen = []

    def choose(rows):
        stays = ~rows.optional | (random.random(len(rows)) < 0.4)
        stays[-1] = not last
        chosen.append(stays)
        return stays

    expected = build_plan(sequences(choose), 16, layout)
    plan = build_plan(sequences(None), 16, layout)
    images = np.flatnonzero(np.diff(plan.column("optional_image"), prepend=-1))
    assert plan.column("optional_image")[images].tolist() == [0, 1, 2]
    optional = [image_rows(GEOMETRY, *size).optional for size in SIZES]
    left_out = np.zeros(plan.rows, bool)
    left_out[plan.column("optional_row")] = ~np.concatenate(
        [stays[which] for stays, which in zip(chosen, optional, strict=True)]
    )
    found, used = without_rows(plan, left_out)
    assert 0 < left_out.sum() < len(left_out)
    assert (found.lengths, found.rows, found.images) == (expected.lengths, expected.rows, expected.images)
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.column(name), column, err_msg=name)
    np.testing.assert_array_equal(plan.column("kept")[used], expected.column("kept"))


def test_branches_keep_their_positions():
    rows = image_rows(GEOMETRY, 30, 62)
    stays = ~rows.optional
    pieces = [[VisualPiece(rows), text(1, 2, 3, 4, answers=(1, 2, 3, 4))]]
    left_out = np.append(~stays, [False] * 4)
    plan, _ = without_rows(build_plan(pieces, 16, branches=[(2, 2)]), left_out)
    expected = build_plan([[VisualPiece(rows.only(stays)), pieces[0][1]]], 16, branches=[(2, 2)])
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(plan.column(name), column, err_msg=name)


def test_other_rows_cannot_be_left_out():
    plan = build_plan([[text(1, 2)]], 16)
    with pytest.raises(ValueError, match="only visual rows"):
        without_rows(plan, np.array([True, False]))
