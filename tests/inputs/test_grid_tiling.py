"""InternVL's tiling against transformers' image processor: which tiles, how many, and their pixels to the bit."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.plan.columns import MODALITY_IMAGE, MODALITY_TEXT, TEXT, VISUAL
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views
from llava_fast.inputs.tiling.grid import GridTiling, nearest_grid
from llava_fast.inputs.tiling.rows import FEATURE, TOKEN, UNKNOWN_TOKEN
from tests.support import tiny

TILE = 28
SIZES = [(1, 1), (28, 28), (29, 28), (40, 300), (300, 40), (60, 90), (90, 60), (100, 100), (57, 171), (7, 500)]


def geometry(least: int = 1, most: int = 6, **options) -> VisualGeometry:
    return VisualGeometry(TILE, 14, tiling=GridTiling(least, most, **options))


def test_grids_are_transformers_at_random_sizes():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 8.5, 2)))
        least, most = sorted(int(number) for number in rng.integers(1, 15, 2))
        columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        assert nearest_grid(height, width, 448, least, most) == (rows, columns), (height, width, least, most)
        seen.add((rows, columns))
    assert len(seen) > 20


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_transformers_to_the_bit(size):
    image = tiny.picture(*size)
    stock = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=6, do_rescale=False, do_normalize=False
    )
    expected = stock([Image.fromarray(image)], return_tensors="np")
    found = make_tiles(image, image_views(geometry(), *size), TILE)
    assert len(found) == expected["num_patches"][0] == image_rows(geometry(), *size).tiles
    assert np.array_equal(found, expected["pixel_values"])


def test_rows_are_those_of_the_tiles_in_order():
    rows = image_rows(geometry(), 40, 300)
    assert rows.tiles == 7
    assert rows.index.tolist() == list(range(7 * 4))
    assert not rows.kind.any()
    assert image_rows(geometry(thumbnail=False), 40, 300).tiles == 6
    assert image_rows(geometry(most=1), 40, 300).tiles == 1  # no thumbnail beside a single tile
    dropped = VisualGeometry(TILE, 14, dropped_rows=1, tiling=GridTiling(2, 2))
    assert image_rows(dropped, 10, 20).index.tolist() == [row for row in range(15) if row % 5]


def test_tokens_stand_around_an_images_rows():
    rows = image_rows(geometry(before=(7, 8), after=(9,)), 40, 60)
    tiles = rows.tiles * 4
    assert rows.kind.tolist() == [TOKEN] * 2 + [FEATURE] * tiles + [TOKEN]
    assert rows.index.tolist() == [7, 8, *range(tiles), 9]
    assert rows.token_ids.tolist() == [7, 8, 9]
    text, image = TextPiece(np.array([5, 8])), VisualPiece(rows)
    plan = build_plan([[image, text], [text, image]], 4)
    for start, row in ((0, 0), (len(rows) + 4, tiles)):
        window = slice(start, start + len(rows))
        assert plan.column("source")[window].tolist() == [TEXT] * 2 + [VISUAL] * tiles + [TEXT]
        assert plan.column("row")[window].tolist() == [7, 8, *range(row, row + tiles), 9]
        modality = [MODALITY_TEXT] * 2 + [MODALITY_IMAGE] * tiles + [MODALITY_TEXT]
        assert plan.column("modality")[window].tolist() == modality
    assert plan.column("text_token").tolist() == [5, 7, 8, 9]
    assert np.diff(plan.column("text_segment")).tolist() == [2, 2, 4, 2]


def test_tokens_that_no_tokenizer_has_named_are_refused():
    rows = image_rows(geometry(before=(UNKNOWN_TOKEN,)), 40, 60)
    with pytest.raises(ValueError, match="the ids of tokens around tiles are not known"):
        build_plan([[VisualPiece(rows)]], 4)


@pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3), (1, 1025)])
def test_numbers_that_make_no_grid_are_refused(least, most):
    with pytest.raises(ImageError, match="min_patches <= max_patches"):
        GridTiling(least, most)
