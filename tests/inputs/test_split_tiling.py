"""Idefics3's tiling against transformers' image processor: which tiles, their pixels to the bit, and rows in order."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    _resize_output_size_rescale_to_max_len,
    _resize_output_size_scale_below_upper_bound,
)

from llava_fast.inputs.pictures.tiles import make_tiles, plan_tiles, resized_first
from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views
from llava_fast.inputs.tiling.rows import FEATURE, TOKEN, UNKNOWN_TOKEN
from llava_fast.inputs.tiling.split import SplitTiling, resized_to
from tests.support import tiny

TILE, LONGEST = 28, 70
SIZES = [(1, 1), (28, 28), (70, 70), (40, 300), (300, 40), (60, 90), (71, 71), (1, 500), (500, 3), (84, 56)]


def geometry(split: bool = True, longest: int = LONGEST, **options) -> VisualGeometry:
    return VisualGeometry(TILE, 14, filter="lanczos", tiling=SplitTiling(longest, split, **options))


def test_sizes_are_transformers_at_random():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 8.5, 2)))
        longest = int(rng.integers(1, 6000))
        expected = _resize_output_size_rescale_to_max_len(height, width, max_len=longest)
        expected = _resize_output_size_scale_below_upper_bound(*expected, max_len=4096)
        assert resized_to(height, width, longest) == expected, (height, width, longest)
        tiling = SplitTiling(longest)
        views = tiling.views(VisualGeometry(364, 14, tiling=tiling), height, width)
        assert max(views[0].canvas) <= 364 * tiling.most_along_side(364)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_transformers_to_the_bit(size, split):
    image = tiny.picture(*size)
    stock = Idefics3ImageProcessorPil(
        size={"longest_edge": LONGEST},
        max_image_size={"longest_edge": TILE},
        do_image_splitting=split,
        do_rescale=False,
        do_normalize=False,
    )
    expected = stock([Image.fromarray(image)], input_data_format="channels_last", return_tensors="np")
    views = image_views(geometry(split), *size)
    found = make_tiles(image, views, TILE)
    assert len(found) == image_rows(geometry(split), *size).tiles
    assert np.array_equal(found, expected["pixel_values"][0])
    assert np.array_equal(make_tiles(*resized_first(image, views), TILE), found)


def test_rows_have_their_tokens_between():
    names = tuple(tuple((100 + 10 * row + column, 7) for column in range(3)) for row in range(3))
    options = {"before_tile": names, "line": (1,), "last_line": (2, 3), "before_whole": (4, 5), "after_whole": (6,)}
    rows = image_rows(geometry(**options), 60, 90)  # 2 x 3 tiles
    tiles = iter(range(0, 28, 4))
    expected = []
    for row in range(2):
        for column in range(3):
            expected += [*names[row][column], *_four(next(tiles))]
        expected += [1] if row == 0 else [2, 3]
    expected += [4, 5, *_four(next(tiles)), 6]
    assert rows.tiles == 7
    assert rows.index.tolist() == expected
    assert (rows.kind == FEATURE).sum() == 28
    assert rows.token_ids.tolist() == [each for each, kind in zip(expected, rows.kind, strict=True) if kind == TOKEN]
    alone = image_rows(geometry(False, **options), 60, 90)
    assert alone.index.tolist() == [4, 5, *_four(0), 6]
    unknown = image_rows(geometry(), 60, 90).token_ids
    assert set(unknown) == {UNKNOWN_TOKEN}


def test_views_that_need_another_resize_first_are_refused_where_they_cannot_be_made():
    views = image_views(geometry(), 60, 90)
    with pytest.raises(ValueError, match="call resized_first before plan_tiles"):
        plan_tiles([(60, 90)], [views], TILE)
    with pytest.raises(ValueError, match="the same `through`"):
        make_tiles(tiny.picture(60, 90), [*views, View((TILE, TILE), (0, 0), (TILE, TILE))], TILE)


def _four(first: int) -> list[int]:
    return [first + number for number in range(4)]
