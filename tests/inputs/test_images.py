"""The resize is Pillow's to the bit; tiles are the original LLaVA's."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_fast import _C
from llava_fast.inputs.pictures.tiles import INSTALLED_PILLOW, _all_threads, _fields, make_tiles, resize
from llava_fast.inputs.pictures.view import View

FIXTURES = Path(__file__).parent.parent / "fixtures"
LEVELS = _C.simd_levels()
ORDERS = ("12.1", "12", "13")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pil_resize(image, height, width):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def reference_resize(image, height, width, pillow):
    """Pillow's resize with the order of passes of any version: a resize along one axis is the same in all."""
    if pillow == INSTALLED_PILLOW:
        return pil_resize(image, height, width)
    rows_lost, columns_lost = image.shape[0] - height, image.shape[1] - width
    tall = image.shape[0] > 100 * image.shape[1]
    vertical_first = {"12.1": False, "12": rows_lost > 0 and tall, "13": rows_lost > max(0, 2 * columns_lost)}
    if vertical_first[pillow]:
        return pil_resize(pil_resize(image, height, image.shape[1]), height, width)
    return pil_resize(pil_resize(image, image.shape[0], width), height, width)


def view(size, offset=(0, 0), canvas=None, square=False, fill=(0, 0, 0), filter="bicubic"):
    return View(size, offset, canvas or size, square, fill, filter)


def reference_tiles(image, views, tile):
    """What make_tiles says it does, one step at a time, [tiles, 3, tile, tile]."""
    stack = []
    for v in views:
        source = Image.fromarray(image)
        if v.square:
            side = max(source.size)
            square = Image.new("RGB", (side, side), v.fill)
            square.paste(source, ((side - source.width) // 2, (side - source.height) // 2))
            source = square
        resized = source.resize(v.size[::-1], Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", v.canvas[::-1], v.fill)
        canvas.paste(resized, v.offset[::-1])
        pixels = np.asarray(canvas).transpose(2, 0, 1)
        for y in range(0, v.canvas[0], tile):
            stack += [pixels[:, y : y + tile, x : x + tile] for x in range(0, v.canvas[1], tile)]
    return np.stack(stack)


# --- resize ---


@pytest.mark.parametrize("seed", range(5))
def test_resize_equals_pillow_at_random_sizes(seed, monkeypatch):
    """1,000 pairs of sizes a seed, each in every order of the passes; the instruction sets take turns."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, 3 * 400 * 400, dtype=np.uint8)
    differing = 0  # cases in which the order of the passes shows
    for case in range(1000):
        height, width, out_height, out_width = np.exp(rng.uniform(0, math.log(250), 4)).astype(int).tolist()
        if case % 10 == 0:
            out_height = height
        if case % 10 == 1:
            out_width = width
        start = int(rng.integers(0, 1000))
        image = pixels[start : start + 3 * height * width].reshape(height, width, 3)
        results = []
        for turn, pillow in enumerate(ORDERS):
            monkeypatch.setenv("LLAVA_FAST_SIMD", LEVELS[(case + turn) % len(LEVELS)])
            results.append(resize(image, (out_height, out_width), pillow=pillow, threads=1))
            expected = reference_resize(image, out_height, out_width, pillow)
            where = f"{width}x{height} to {out_width}x{out_height}, Pillow {pillow}"
            np.testing.assert_array_equal(results[-1], expected, err_msg=where)
        differing += not np.array_equal(results[0], results[2])
    assert differing > 100


def test_tall_images_are_where_pillow_12_differs():
    """More than 100 times as high as wide, and shrunk: 12.2 and 12.3 run the vertical pass first, 12.1 does not."""
    for before, after, same in (((301, 3), (20, 5), False), ((300, 3), (20, 5), True), ((301, 3), (302, 5), True)):
        image = noise(*before)
        older, newer = (resize(image, after, pillow=pillow) for pillow in ("12.1", "12"))
        assert np.array_equal(older, newer) == same
        np.testing.assert_array_equal(older, reference_resize(image, *after, "12.1"))
        np.testing.assert_array_equal(newer, reference_resize(image, *after, "12"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 4000), (336, 336)),
        ((4000, 1), (336, 336)),
        ((1, 1), (50, 70)),
        ((40, 30), (800, 600)),
        ((3000, 700), (1, 1)),
        ((2500, 64), (7, 64)),
        ((64, 2500), (64, 7)),
        ((90, 17), (90, 17)),
        ((768, 1024), (504, 672)),
        ((336, 335), (336, 336)),
    ],
)
def test_resize_equals_pillow_at_extreme_sizes(before, after, level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    image = noise(*before)
    for pillow in ORDERS:
        result = resize(image, after, pillow=pillow, threads=2)
        np.testing.assert_array_equal(result, reference_resize(image, *after, pillow))


@pytest.mark.parametrize("level", LEVELS)
def test_extreme_pixels_clamp_as_in_pillow(level, monkeypatch):
    """Black and white pixels drive the sums beyond a byte on both sides."""
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    image = np.where(noise(61, 83) < 128, 0, 255).astype(np.uint8)
    for size in ((244, 250), (40, 50), (200, 20)):
        np.testing.assert_array_equal(resize(image, size), pil_resize(image, *size))


@pytest.mark.parametrize("level", LEVELS)
def test_threads_do_not_change_pixels(level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    image = noise(501, 703)
    for size in ((336, 471), (900, 333), (130, 800)):
        one = resize(image, size, threads=1)
        np.testing.assert_array_equal(one, resize(image, size, threads=4))


def test_default_order_is_the_installed_pillows():
    image = noise(300, 40)
    np.testing.assert_array_equal(resize(image, (30, 40 - 7)), pil_resize(image, 30, 33))


def test_resize_reads_strided_arrays():
    image = noise(60, 90)[::2, ::3]
    np.testing.assert_array_equal(resize(image, (50, 20)), pil_resize(np.ascontiguousarray(image), 50, 20))


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), [[1]]])
def test_resize_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match=r"uint8 array \[height, width, 3\]"):
        resize(bad, (2, 2))


def test_resize_refuses_bad_options(monkeypatch):
    image = noise(4, 4)
    with pytest.raises(ValueError, match="at least 1x1"):
        resize(image, (0, 3))
    with pytest.raises(ValueError, match="at least one pixel"):
        resize(image[:0], (3, 3))
    with pytest.raises(ValueError, match=r'"12.1", "12" or "13"'):
        resize(image, (3, 3), pillow="9")
    monkeypatch.setenv("LLAVA_FAST_SIMD", "mmx")
    with pytest.raises(ValueError, match="LLAVA_FAST_SIMD is mmx, and this processor runs scalar"):
        resize(image, (3, 3))


def test_threads_follow_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _all_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert _all_threads() >= 1


# --- tiles ---


def original_views(width, height, pinpoints, tile=336):
    """The original LLaVA's geometry: pinpoints are (width, height), the base view is squashed and comes first."""

    def rank(pinpoint):
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        useful = min(int(width * scale) * int(height * scale), width * height)
        return useful, useful - pinpoint[0] * pinpoint[1]

    canvas_width, canvas_height = max(pinpoints, key=rank)  # the first of equals
    scale_w, scale_h = canvas_width / width, canvas_height / height
    if scale_w < scale_h:
        size = (min(math.ceil(height * scale_w), canvas_height), canvas_width)
    else:
        size = (canvas_height, min(math.ceil(width * scale_h), canvas_width))
    offset = ((canvas_height - size[0]) // 2, (canvas_width - size[1]) // 2)
    return [view((tile, tile)), view(size, offset, (canvas_height, canvas_width))]


TILE_FIXTURE = json.loads((FIXTURES / "anyres_tiles_llava.json").read_text())


@pytest.mark.parametrize(("width", "height", "hashes"), TILE_FIXTURE["rows"])
def test_tiles_are_the_original_llavas(width, height, hashes):
    """Executed from the original code with Pillow 13 (see the fixture's "source")."""
    image = noise(height, width, seed=width * 100003 + height)
    tiles = make_tiles(image, original_views(width, height, TILE_FIXTURE["pinpoints_w_h"]), 336, pillow="13")
    found = [hashlib.sha256(np.ascontiguousarray(tile.transpose(1, 2, 0)).tobytes()).hexdigest()[:16] for tile in tiles]
    assert found == hashes


VIEWS = {
    "squash": [view((60, 60))],
    "pad to a square": [view((60, 60), square=True, fill=(122, 116, 104))],
    "centre crop": [view((60, 91), (0, -15), (60, 60))],
    "crop both sides": [view((100, 131), (-20, -36), (60, 60))],
    "grid": [view((60, 60)), view((90, 120), (15, 0), (120, 120), fill=(1, 2, 3))],
    "narrow": [view((180, 7), (0, 26), (180, 60))],
    "off the canvas": [view((60, 60), (-60, 0), (60, 60), fill=(9, 8, 7))],
    "both": [view((70, 50), (-3, 6), (60, 60), square=True, fill=(255, 0, 50))],
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", VIEWS)
def test_tiles_are_resized_placed_and_cut(name, level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    for height, width in ((77, 131), (131, 77), (60, 60), (3, 400)):
        image = noise(height, width)
        expected = reference_tiles(image, VIEWS[name], 60)
        for threads in (1, 4):
            tiles = make_tiles(image, VIEWS[name], 60, threads=threads)
            np.testing.assert_array_equal(tiles, expected)
        assert tiles.dtype == np.uint8
        assert tiles.flags.c_contiguous
        assert tiles.flags.writeable


@pytest.mark.parametrize(("tile", "patch"), [(56, 14), (60, 14), (64, 16), (60, 6), (60, 20), (56, 56)])
def test_patch_rows_are_patches_in_order(tile, patch):
    """Rows of (channel, y, x), zeros up to a multiple of 16; pixels beyond the last whole patch are left out."""
    views = [view((tile, tile)), view((tile, 2 * tile - 9), (0, 4), (tile, 2 * tile), fill=(5, 6, 7))]
    image = noise(90, 130)
    planar = make_tiles(image, views, tile)
    side = tile // patch
    whole = planar[:, :, : side * patch, : side * patch].reshape(3, 3, side, patch, side, patch)
    expected = whole.transpose(0, 2, 4, 1, 3, 5).reshape(3, side * side, 3 * patch * patch)
    rows = make_tiles(image, views, tile, tile_format="patch_rows", patch_size=patch)
    assert rows.shape == (3, side * side, -(-3 * patch * patch // 16) * 16)
    np.testing.assert_array_equal(rows[..., : 3 * patch * patch], expected)
    assert not rows[..., 3 * patch * patch :].any()


@pytest.mark.parametrize("patch", [None, 14, 20])
@pytest.mark.parametrize("pillow", ORDERS)
def test_cuda_threads_on_the_host_make_the_same_tiles(pillow, patch):
    """The CUDA kernels' per-thread code, compiled for the host, over a batch of sizes; the kernels run no float."""
    batch = [noise(*size) for size in ((77, 131), (131, 77), (60, 60), (230, 2), (3, 400))]
    views = [[v for name in list(VIEWS)[i % 4 :: 2] for v in VIEWS[name]] for i in range(len(batch))]
    layout = (False, 1) if patch is None else (True, patch)
    fields = [[_fields(v) for v in per_image] for per_image in views]
    plan = _C.plan_tiles([image.shape[:2] for image in batch], fields, 60, pillow, *layout)
    pixels = np.concatenate([image.ravel() for image in batch])
    tiles = _C.run_tile_plan(plan, pixels, 60, *layout)
    options = {"pillow": pillow} | ({} if patch is None else {"tile_format": "patch_rows", "patch_size": patch})
    expected = [make_tiles(image, v, 60, **options) for image, v in zip(batch, views, strict=True)]
    np.testing.assert_array_equal(tiles, np.concatenate(expected))


def test_torchvision_resample_is_torchs_antialiased_bicubic():
    torch = pytest.importorskip("torch")
    image = noise(70, 110)
    pixels = torch.tensor(image).permute(2, 0, 1)[None]

    def resized(source, size):
        return torch.nn.functional.interpolate(source, size=size, mode="bicubic", antialias=True)[0].numpy()

    tiles = make_tiles(image, [view((28, 28))], 28, resample="torchvision")
    np.testing.assert_array_equal(tiles[0], resized(pixels, (28, 28)))
    exact = make_tiles(image, [view((28, 28))], 28)
    assert 0 < np.abs(tiles.astype(int) - exact).max() <= 2

    padded = view((40, 40), (8, 8), (56, 56), square=True, fill=(10, 20, 30))
    tiles = make_tiles(image, [padded], 56, resample="torchvision")
    square = torch.tensor(padded.fill, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 110, 110)
    square[:, :, 20:90] = pixels
    np.testing.assert_array_equal(tiles[0][:, 8:48, 8:48], resized(square, (40, 40)))
    assert (tiles[0][:, :8].reshape(3, -1) == np.array([[10], [20], [30]])).all()


def test_bad_views_are_refused():
    image = noise(20, 20)
    with pytest.raises(ValueError, match="multiple of the tile"):
        make_tiles(image, [view((20, 20), (0, 0), (28, 30))], 28)
    with pytest.raises(ValueError, match="multiple of the tile"):
        make_tiles(image, [view((20, 20), (0, 0), (0, 28))], 28)
    with pytest.raises(ValueError, match="at least 1x1"):
        make_tiles(image, [view((0, 20), (0, 0), (28, 28))], 28)
    with pytest.raises(ValueError, match="patch size"):
        make_tiles(image, [view((28, 28))], 28, tile_format="patch_rows", patch_size=29)
    with pytest.raises(ValueError, match="resample"):
        make_tiles(image, [view((28, 28))], 28, resample="nearest")
    with pytest.raises(ValueError, match="tile_format"):
        make_tiles(image, [view((28, 28))], 28, tile_format="rows")
