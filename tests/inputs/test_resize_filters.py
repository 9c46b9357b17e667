"""Every filter of Pillow's, to the bit: resizes, tiles, and the plan from which a device makes them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from llava_fast import _C
from llava_fast.inputs.pictures.preprocessing import FILTERS
from llava_fast.inputs.pictures.tiles import INSTALLED_PILLOW, TORCH_MODES, _fields, make_tiles, resize
from llava_fast.inputs.pictures.view import View

LEVELS = _C.simd_levels()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow(image, height, width, filter):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[filter.upper()]))


def in_order(image, height, width, filter, order):
    """Pillow's resize with the order of passes of any version: along one axis all versions agree."""
    rows_lost, columns_lost = image.shape[0] - height, image.shape[1] - width
    tall = image.shape[0] > 100 * image.shape[1]
    if {"12.1": False, "12": rows_lost > 0 and tall, "13": rows_lost > max(0, 2 * columns_lost)}[order]:
        return pillow(pillow(image, height, image.shape[1], filter), height, width, filter)
    return pillow(pillow(image, image.shape[0], width, filter), height, width, filter)


def test_filters_are_numbered_as_in_pillow():
    assert [Image.Resampling(number).name.lower() for number in range(6)] == list(FILTERS)


@pytest.mark.parametrize("filter", FILTERS)
def test_resize_equals_pillow(filter, monkeypatch):
    """Both directions, odd shapes, single rows and columns; instruction sets and orders of passes take turns."""
    rng = np.random.default_rng(0)
    sizes = [np.exp(rng.uniform(0, math.log(200), 4)).astype(int).tolist() for _ in range(150)]
    sizes += [(1, 300, 28, 28), (300, 1, 28, 28), (1, 1, 30, 50), (400, 3, 5, 2), (37, 41, 37, 90), (41, 37, 8, 37)]
    sizes += [(7, 9, 700, 1), (1000, 11, 333, 444), (2, 2, 3, 3), (28, 28, 28, 28)]
    for case, (height, width, *size) in enumerate(sizes):
        monkeypatch.setenv("LLAVA_FAST_SIMD", LEVELS[case % len(LEVELS)])
        image, order = noise(height, width, case), ("12.1", "12", "13")[case // len(LEVELS) % 3]
        found = resize(image, size, filter=filter, pillow=order, threads=1)
        np.testing.assert_array_equal(found, in_order(image, *size, filter, order), err_msg=f"{height, width, size}")
        default = resize(image, size, filter=filter, threads=1)
        np.testing.assert_array_equal(default, pillow(image, *size, filter), err_msg=f"{height, width, size}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("filter", FILTERS)
def test_black_and_white_clamp_as_in_pillow(filter, level, monkeypatch):
    """Lanczos has the largest weights of all: a kernel that cut them too short would show here."""
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    image = np.where(noise(61, 83) < 128, 0, 255).astype(np.uint8)
    for size in ((244, 250), (40, 50), (62, 84), (200, 20)):
        np.testing.assert_array_equal(resize(image, size, filter=filter), pillow(image, *size, filter))


@pytest.mark.parametrize("patch", [None, 14])
def test_a_batch_of_views_of_all_filters(patch):
    """Filters mixed in one image's views, on the host's path and on the device's; equal axes share no table."""
    batch = [noise(*size) for size in ((77, 131), (131, 77), (3, 230), (56, 56))]
    views = [View((56, 56), (0, 0), (56, 56), filter=filter) for filter in FILTERS]
    views += [View((40, 80), (8, -12), (56, 56), True, (9, 8, 7), filter) for filter in FILTERS]
    options = {} if patch is None else {"tile_format": "patch_rows", "patch_size": patch}
    made = [make_tiles(image, views, 56, **options) for image in batch]
    if patch is None:
        for image, tiles in zip(batch, made, strict=True):
            for filter, tile in zip(FILTERS, tiles[:6], strict=True):
                np.testing.assert_array_equal(tile, pillow(image, 56, 56, filter).transpose(2, 0, 1))
    layout = (False, 1) if patch is None else (True, patch)
    fields = [[_fields(view) for view in views]] * len(batch)
    plan = _C.plan_tiles([image.shape[:2] for image in batch], fields, 56, INSTALLED_PILLOW, *layout)
    pixels = np.concatenate([image.ravel() for image in batch])
    np.testing.assert_array_equal(_C.run_tile_plan(plan, pixels, 56, *layout), np.concatenate(made))


@pytest.mark.parametrize("filter", FILTERS)
def test_torchvision_has_three_filters(filter):
    image = noise(70, 110)
    view = View((28, 28), (0, 0), (28, 28), filter=filter)
    if filter not in TORCH_MODES:
        with pytest.raises(ValueError, match=f"not {filter}: use resample='pillow'"):
            make_tiles(image, [view], 28, resample="torchvision")
        return
    found = make_tiles(image, [view], 28, resample="torchvision")[0]
    source = torch.tensor(image).permute(2, 0, 1)[None]
    mode, antialias = TORCH_MODES[filter], filter != "nearest"
    expected = torch.nn.functional.interpolate(source, (28, 28), mode=mode, antialias=antialias)[0]
    np.testing.assert_array_equal(found, expected.numpy())
    exact = make_tiles(image, [view], 28)[0]
    assert np.abs(found.astype(int) - exact).max() <= (0 if filter == "nearest" else 2)


def test_an_unknown_filter_is_refused():
    with pytest.raises(ValueError, match=r'must be nearest, box.*not "cubic"'):
        resize(noise(4, 4), (2, 2), filter="cubic")
