"""What a drawing of tiles is made from: it agrees with rows and tiles, and with a picture that is cut for real."""

from dataclasses import replace

import numpy as np
import pytest

from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.coverage import image_coverage, video_coverage
from llava_fast.inputs.tiling.grid import GridTiling
from llava_fast.inputs.tiling.native import NativeTiling
from llava_fast.inputs.tiling.rows import FEATURE, NEWLINE, POOLED, TOKEN
from llava_fast.inputs.tiling.slices import SliceTiling
from llava_fast.inputs.tiling.split import SplitTiling

PINPOINTS = ((64, 32), (32, 64), (64, 64), (96, 32))
ANYRES = {"aspect": "anyres", "pinpoints": PINPOINTS, "merge": "spatial_unpad"}
GEOMETRIES = {
    "squash": VisualGeometry(32, 4, class_rows=1),
    "crop": VisualGeometry(32, 4, aspect="crop", dropped_rows=1),
    "pad": VisualGeometry(32, 4, aspect="pad"),
    "unpad": VisualGeometry(32, 4, **ANYRES, dropped_rows=1),
    "flat": VisualGeometry(32, 4, aspect="anyres", pinpoints=PINPOINTS),
    "shrunk": VisualGeometry(32, 4, **ANYRES, max_tiles=1),
    "maxpool": VisualGeometry(32, 4, **(ANYRES | {"merge": "spatial_maxpool2x2"})),
    "highres": VisualGeometry(32, 4, aspect="highres", pinpoints=((96, 96),), merge="spatial", pad_color=(1, 2, 3)),
    "grid": VisualGeometry(32, 8, tiling=GridTiling(1, 6, True, (7,), (8,))),
    "native": VisualGeometry(4, 4, tiling=NativeTiling(40)),
    "split": VisualGeometry(32, 8, tiling=SplitTiling(80)),
    "slices": VisualGeometry(4, 4, tiling=SliceTiling(32, 9)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", [(90, 120), (33, 200), (300, 40), (10, 10), (1, 1)], ids=str)
def test_counts_are_the_rows(name, size):
    geometry = GEOMETRIES[name]
    seen = image_coverage(geometry, *size)
    kind = seen.rows.kind
    every = [region for of_view in seen.regions for region in of_view]
    assert sum(region.tokens for region in every) == np.isin(kind, (FEATURE, POOLED)).sum()
    assert len(kind) == sum(region.tokens for region in every) + np.isin(kind, (NEWLINE, TOKEN)).sum()
    tiles = len(seen.rows.grids) if seen.rows.grids else seen.rows.tiles
    assert len(every) == tiles
    for region in every:
        assert len(region.points) == (0 if name == "slices" else region.tokens - geometry.class_rows)
        if region.kept is not None:
            left, top, width, height = region.kept
            assert left >= region.box[0] - 1e-6
            assert left + width <= region.box[0] + region.box[2] + 1e-6
            assert top >= region.box[1] - 1e-6
            assert top + height <= region.box[1] + region.box[3] + 1e-6


@pytest.mark.parametrize("name", ["squash", "crop", "pad", "unpad", "flat", "shrunk", "highres", "grid"])
@pytest.mark.parametrize("size", [(90, 120), (33, 200), (300, 40)], ids=str)
def test_a_box_is_where_its_tile_was_cut(name, size):
    """The picture's red is x and its green y, so a tile says where it was cut from (bilinear: no overshoot)."""
    geometry, (height, width) = replace(GEOMETRIES[name], filter="bilinear"), size
    seen = image_coverage(geometry, height, width)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width)[None] * 255 // width
    picture[..., 1] = np.arange(height)[:, None] * 255 // height
    picture[..., 2] = 255
    tiles = make_tiles(picture, seen.views, geometry.tile_size, threads=1)
    checked = 0
    for tile, region in zip(tiles, [each for of_view in seen.regions for each in of_view], strict=True):
        left, top, across, down = region.box
        for part in (0.3, 0.5, 0.7):
            x, y = left + part * across, top + part * down
            red, green, blue = tile[:, int(part * geometry.tile_size), int(part * geometry.tile_size)].tolist()
            if blue < 255:  # padding, or its edge
                continue
            checked += 1
            assert red * width / 255 == pytest.approx(x, abs=across / geometry.tile_size + width / 255 + 1)
            assert green * height / 255 == pytest.approx(y, abs=down / geometry.tile_size + height / 255 + 1)
    assert checked


def test_unpadding_keeps_what_the_picture_covers():
    """200x33 on a canvas of 64x32, of which it covers the middle: the base view keeps all, each tile its own part."""
    seen = image_coverage(GEOMETRIES["unpad"], 33, 200)
    (base,), tiles = seen.regions
    assert base.box == base.kept == pytest.approx((0, 0, 200, 33))
    assert base.tokens == 64
    for region in tiles:
        assert region.box[3] > 33 > -region.box[1] > 0, "padded above and below"
        assert region.box[3] > region.kept[3] >= 33 - region.box[3] / 8
        assert region.points[:, 1].min() > -region.box[3] / 8
        assert region.tokens == len(region.points) < 64


def test_a_row_pooled_from_two_tiles_reads_both():
    """Seven patches a side, pooled by two: each fourth pooled row of a line reads the last of a tile and the first of
    the next, and counts for the first of them."""
    geometry = VisualGeometry(28, 4, aspect="anyres", pinpoints=((28, 56),), merge="spatial_maxpool2x2")
    _, (left, right) = image_coverage(geometry, 28, 56).regions
    assert left.kept == pytest.approx((0, 0, 28, 24))
    assert right.kept == pytest.approx((28, 0, 28, 24))
    assert (left.tokens, right.tokens) == (12, 9)


def test_a_native_image_is_one_region_of_patches():
    seen = image_coverage(GEOMETRIES["native"], 90, 120)
    ((region,),) = seen.regions
    assert region.box == region.kept == pytest.approx((0, 0, 120, 90))
    (grid,) = seen.rows.grids
    assert region.tokens == grid[0] * grid[1]
    assert region.points[0] == pytest.approx([60 / grid[1], 45 / grid[0]])
    assert region.points[-1] == pytest.approx([120 - 60 / grid[1], 90 - 45 / grid[0]])


@pytest.mark.parametrize("pool", ["none", "average", "max", "bilinear"])
def test_a_video_has_a_view_for_each_frame(pool):
    geometry = VisualGeometry(32, 4, video_pool=pool, video_newline="grid", frame_aspect="squash")
    seen = video_coverage(geometry, 3, 90, 120)
    assert len(seen.views) == len(seen.regions) == 3
    (first,), *others = seen.regions
    assert first.tokens == (64 if pool == "none" else 16)
    assert first.box == first.kept == pytest.approx((0, 0, 120, 90))
    for (other,) in others:
        np.testing.assert_array_equal(other.points, first.points)
    assert first.points[0] == pytest.approx([7.5, 5.625] if pool == "none" else [15, 11.25])
    assert sum(region.tokens for (region,) in seen.regions) == np.isin(seen.rows.kind, (FEATURE, POOLED)).sum()
