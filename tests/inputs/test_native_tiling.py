"""Images of native sizes against transformers' SigLIP 2 image processor: grids, and patches to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.plan.buckets import bucket_of, fill
from llava_fast.inputs.plan.plan import VisualPiece, build_plan
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_rows, image_views
from llava_fast.inputs.tiling.native import NativeTiling, patch_grid
from llava_fast.inputs.tiling.video import video_rows
from tests.support import tiny

PATCH = 8
SIZES = [(1, 1), (8, 8), (64, 64), (63, 65), (40, 300), (300, 40), (90, 60), (1, 700), (700, 1)]


def geometry(most: int = 24) -> VisualGeometry:
    return VisualGeometry(PATCH, PATCH, filter="bilinear", tiling=NativeTiling(most))


def test_grids_are_transformers_at_random_sizes():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(side) for side in np.exp(rng.uniform(0, 9, 2)))
        patch, most = int(rng.integers(1, 33)), int(rng.integers(1, 1100))
        expected = get_image_size_for_max_num_patches(height, width, patch, most)
        rows, columns = patch_grid(height, width, patch, most)
        assert (rows * patch, columns * patch) == expected, (height, width, patch, most)
        assert rows * columns <= most


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_transformers_to_the_bit(size):
    image = tiny.picture(*size)
    stock = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=24, do_rescale=False, do_normalize=False)
    expected = stock([Image.fromarray(image)], return_tensors="np")
    found = make_tiles(image, image_views(geometry(), *size), PATCH)
    rows = image_rows(geometry(), *size)
    assert len(found) == len(rows) == rows.tiles == expected["pixel_attention_mask"].sum()
    assert rows.grids == (tuple(expected["spatial_shapes"][0]),)
    columns_last = found.transpose(0, 2, 3, 1).reshape(len(found), -1)
    assert np.array_equal(columns_last, expected["pixel_values"][0, : len(found)])


def test_patches_of_torchs_resize_are_those_of_its_tensors():
    image = tiny.picture(50, 90)
    (view,) = image_views(geometry(), 50, 90)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, view.size, mode="bilinear", antialias=True)[0]
    rows, columns = view.size[0] // PATCH, view.size[1] // PATCH
    expected = resized.reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4).flatten(0, 1)
    assert np.array_equal(make_tiles(image, [view], PATCH, resample="torchvision"), expected.numpy())


def test_a_plan_knows_each_images_grid():
    sizes = [(40, 300), (64, 64)]
    pieces = [[VisualPiece(image_rows(geometry(), *size))] for size in sizes]
    plan = build_plan(pieces, geometry().tower_rows_per_tile)
    assert plan.grids == ((2, 12), (4, 4)) == tuple(patch_grid(*size, PATCH, 24) for size in sizes)
    assert plan.tiles == plan.rows == 40
    assert plan.column("kept").tolist() == list(range(40))
    with pytest.raises(ValueError, match="images of native sizes cannot be padded"):
        fill(plan, bucket_of(plan))


def test_what_it_does_not_do_is_refused():
    with pytest.raises(ImageError, match=r"videos are not supported .* give frames as images"):
        video_rows(geometry(), 2)
    with pytest.raises(ImageError, match="at most 0 patches has no content"):
        NativeTiling(0)
    with pytest.raises(ImageError, match="has no content"):
        image_rows(geometry(), 0, 3)
