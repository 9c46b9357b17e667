"""Plans from ids that a processor has expanded equal plans from pieces, column by column."""

import subprocess
import sys

import numpy as np
import pytest

from llava_fast.errors import ImageError
from llava_fast.inputs.plan.from_ids import placement_columns, rows_of_images, supervised_rows
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.video import video_rows

IMAGE, VIDEO = 90, 91
ANYRES = {"aspect": "anyres", "merge": "spatial_unpad", "pinpoints": ((28, 56), (56, 28), (56, 56))}
GEOMETRIES = {
    "one tile": {},
    "class row dropped": {"dropped_rows": 1},
    "anyres": ANYRES,
    "shrunk": {**ANYRES, "max_tiles": 1, "video_pool": "bilinear", "video_pool_stage": "after"},
    "max": {**ANYRES, "video_pool": "max", "video_pool_stage": "before"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_ids_give_the_columns_of_the_pieces(name, training):
    geometry = VisualGeometry(tile_size=28, patch_size=7, **GEOMETRIES[name])
    sizes = np.array([[40, 90], [100, 30]])
    images = rows_of_images(geometry, sizes, 2)
    film = video_rows(geometry, 2)
    text = [np.array(ids) for ids in ([5, 6, 5], [7], [5, 8], [9])]
    labels = [np.array([False] * 3), np.array([True]), None, np.array([True])] if training else [None] * 4
    pieces = [TextPiece(ids, supervised) for ids, supervised in zip(text, labels, strict=True)]
    visual = [VisualPiece(rows) for rows in (*images, film)]
    sequence = [piece for pair in zip(pieces, visual, strict=False) for piece in pair] + pieces[3:]
    plan = build_plan([sequence], geometry.tower_rows_per_tile)

    placeholders = [[IMAGE] * len(images[0]), [IMAGE] * len(images[1]), [VIDEO] * len(film)]
    ids = np.concatenate([part for pair in zip(text, placeholders, strict=False) for part in pair] + text[3:])[None]
    columns, pools = placement_columns(images, ids, IMAGE, geometry.tower_rows_per_tile, [film], VIDEO, training)

    assert pools == plan.pools
    assert bool(pools) == (name in ("shrunk", "max"))
    shared = columns.keys() - {"place", "video_place"}
    assert {"source", "row", "kept", "text_row", "visual_place"} <= shared
    assert {name for name in plan.sections if name.startswith("pool")} <= shared
    for column in shared:
        assert np.array_equal(columns[column], plan.column(column)), column
    assert (ids[0][columns["place"]] == IMAGE).all()
    assert (ids[0][columns["video_place"]] == VIDEO).all()
    if training:
        spread = np.where(plan.column("label") < 0, -100, plan.column("label"))[None]
        rows, targets = supervised_rows(spread)
        assert np.array_equal(rows, plan.column("supervised_row"))
        assert len(rows) == 2
        assert np.array_equal(targets, plan.column("supervised_target"))


def test_numbers_that_disagree_are_refused():
    geometry = VisualGeometry(tile_size=28, patch_size=7)
    images = rows_of_images(geometry, None, 1)
    with pytest.raises(ImageError, match="2 image tokens, but the images have 16 rows"):
        placement_columns(images, np.array([[IMAGE, 1, IMAGE]]), IMAGE, 16)
    with pytest.raises(ImageError, match="0 video tokens, but the videos have 32 rows"):
        placement_columns([], np.array([[1]]), IMAGE, 16, [video_rows(geometry, 2)], VIDEO)
    with pytest.raises(ImageError, match="2 images, but 1 image sizes"):
        rows_of_images(geometry, np.array([[28, 28]]), 2)
    with pytest.raises(ImageError, match="batch_num_images sums to 3"):
        rows_of_images(geometry, None, 2, np.array([1, 2]))


def test_it_needs_no_torch():
    code = "import sys, llava_fast.inputs.plan.from_ids; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
