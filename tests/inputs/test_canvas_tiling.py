"""SliME's canvases against the original code's own results, stored in tests/fixtures; their tiles against Pillow."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views
from llava_fast.inputs.tiling.canvas import CanvasTiling, canvas_of
from llava_fast.inputs.tiling.coverage import image_coverage
from llava_fast.inputs.tiling.rows import TOKEN
from tests.support import slimes, tiny

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "slime_canvases.json").read_text())["cases"]
GEOMETRY = VisualGeometry(32, 8, tiling=CanvasTiling(2, routed=True, separator=(7,)))


def test_canvases_are_the_originals():
    for width, height, across, down in FIXTURE:
        assert canvas_of(height, width, 336, 6) == (down, across), (width, height)
    assert len(FIXTURE) == 400
    assert len({(across, down) for *_, across, down in FIXTURE}) > 10


@pytest.mark.parametrize("size", [(32, 32), (10, 9), (30, 50), (50, 30), (61, 200), (90, 91)])
def test_tiles_are_those_that_pillow_makes(size):
    image = tiny.picture(*size)
    tiles, _ = slimes.cut(Image.fromarray(image), 32)
    made = make_tiles(image, image_views(GEOMETRY, *size), 32)
    np.testing.assert_array_equal(made, np.stack(tiles).transpose(0, 3, 1, 2))


def test_rows_go_line_by_line_over_all_tiles():
    rows = image_rows(GEOMETRY, 30, 62)  # one line of two tiles, of four rows each
    assert rows.tiles == 3
    assert rows.table_rows == sum(rows.shares) == 16 + 2 * 4
    assert rows.index.tolist() == [*range(16), 7, 16, 17, 20, 21, 18, 19, 22, 23]
    assert rows.kind.tolist().index(TOKEN) == 16
    assert rows.optional.tolist() == [False] * 17 + [True] * 8
    flat = image_rows(VisualGeometry(32, 8, tiling=CanvasTiling(2, spatial=False, separator=(7,))), 30, 62)
    assert flat.index.tolist() == [*range(16), 7, *range(16, 24)]
    assert flat.optional is None
    overview = image_rows(VisualGeometry(32, 8, tiling=CanvasTiling(2, tiled=False)), 30, 62)
    assert (overview.tiles, overview.index.tolist()) == (1, list(range(16)))
    tiled = image_rows(VisualGeometry(32, 8, tiling=CanvasTiling(2, overview=False)), 30, 62)
    assert (tiled.tiles, tiled.index.tolist()) == (2, [0, 1, 4, 5, 2, 3, 6, 7])


def test_each_region_has_its_tokens():
    seen = image_coverage(GEOMETRY, 30, 62)
    assert [[region.tokens for region in regions] for regions in seen.regions] == [[16], [4, 4]]
