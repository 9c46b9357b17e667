"""LLaVA-UHD's slices against the original code's own results, stored in tests/fixtures; their pixels against Pillow."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views
from llava_fast.inputs.tiling.rows import TOKEN
from llava_fast.inputs.tiling.slices import SliceTiling, slices
from tests.support import tiny

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "llava_uhd_slices.json").read_text())["rows"]
PATCH = 4
GEOMETRY = VisualGeometry(PATCH, PATCH, tiling=SliceTiling(24, 4, between=(7,), after=(9,)))


def test_sizes_are_the_originals():
    grids = set()
    for (width, height), overview, grid, each in FIXTURE:
        whole, found, slice_size = slices(height, width, 336, 14, 9)
        assert whole == tuple(overview[::-1]), (width, height)
        assert found == (tuple(grid[::-1]) if grid else (0, 0)), (width, height)
        assert slice_size == (tuple(each[::-1]) if each else (0, 0)), (width, height)
        grids.add(found)
    assert len(FIXTURE) == 400
    assert len(grids) > 10


@pytest.mark.parametrize("size", [(24, 24), (10, 9), (30, 50), (50, 30), (61, 200), (90, 91)])
def test_tiles_are_the_patches_of_slices_that_pillow_makes(size):
    """As the source cuts them: resized whole, slices in row order, then the whole image."""
    image = tiny.picture(*size)
    whole, grid, each = slices(*size, 24, PATCH, 9)
    pictures = []
    if grid[0]:
        resized = Image.fromarray(image).resize((each[1] * grid[1], each[0] * grid[0]), Image.Resampling.BICUBIC)
        pictures = [
            np.asarray(resized)[row * each[0] :][: each[0], column * each[1] :][:, : each[1]]
            for row in range(grid[0])
            for column in range(grid[1])
        ]
    pictures.append(np.asarray(Image.fromarray(image).resize(whole[::-1], Image.Resampling.BICUBIC)))
    rows = image_rows(GEOMETRY, *size)
    assert rows.grids == tuple((one.shape[0] // PATCH, one.shape[1] // PATCH) for one in pictures)
    cut = [one.reshape(one.shape[0] // PATCH, PATCH, -1, PATCH, 3).transpose(0, 2, 4, 1, 3) for one in pictures]
    expected = np.concatenate([one.reshape(-1, 3, PATCH, PATCH) for one in cut])
    assert np.array_equal(make_tiles(image, image_views(GEOMETRY, *size), PATCH), expected)
    assert rows.tiles == len(expected)


def test_separators_follow_each_slice_and_the_whole_comes_last():
    rows = image_rows(GEOMETRY, 48, 72)
    assert slices(48, 72, 24, PATCH, 9)[1] == (2, 3)
    expected = []
    for place in range(6):
        expected += [*range(place * 4, place * 4 + 4), 7 if place % 3 < 2 else 9]
    assert rows.index.tolist() == [*expected, 24, 25, 26, 27]
    assert (rows.kind == TOKEN).sum() == 6
    assert rows.table_rows == 28
    assert image_rows(GEOMETRY, 20, 20).index.tolist() == [0, 1, 2, 3]
