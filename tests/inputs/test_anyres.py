"""AnyRes geometry: recorded answers of the original code, transformers' counts, and the merges on real tensors."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from llava_fast.errors import ImageError
from llava_fast.inputs.plan.columns import CONSTANT, VISUAL
from llava_fast.inputs.plan.plan import VisualPiece, build_plan
from llava_fast.inputs.tiling.anyres import (
    VisualGeometry,
    count_image_rows,
    image_rows,
    image_views,
    parse_pinpoints,
    unpad,
)
from llava_fast.inputs.tiling.rows import VisualRows
from llava_fast.inputs.tiling.video import frame_views, video_rows
from tests.support import tiny

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "anyres_llava.json").read_text())
PINPOINTS = tuple(tuple(pair) for pair in FIXTURE["pinpoints_w_h"])
NEXT = VisualGeometry(336, 14, "anyres", PINPOINTS, "llava", "spatial_unpad")
SIGLIP = VisualGeometry(384, 14, "anyres", parse_pinpoints("(1x1),...,(6x6)", 384), "hf", "spatial_unpad", max_tiles=9)


# ---------------------------------------------------------------- sizes and counts


def test_canvas_grid_kept_and_rows_are_the_original_codes():
    for width, height, canvas_w, canvas_h, grid_w, grid_h, kept_w, kept_h, rows in FIXTURE["rows"]:
        base, tiled = image_views(NEXT, height, width)
        found = image_rows(NEXT, height, width)
        assert base.canvas == (336, 336), (width, height)
        assert tiled.canvas == (canvas_h, canvas_w), (width, height)
        assert found.tiles == 1 + grid_w * grid_h
        _, _, h, w = unpad(height, width, (24 * grid_h, 24 * grid_w), "llava")
        assert (w, h) == (kept_w, kept_h), (width, height)
        assert len(found) == rows == count_image_rows(NEXT, height, width), (width, height)
    assert len(FIXTURE["rows"]) == 1000


@pytest.mark.parametrize(
    ("width", "height", "rows"),
    [
        (672, 672, 2928),
        (1024, 768, 2340),
        (336, 336, 1176),
        (640, 480, 2340),
        (1280, 720, 1948),
        (1920, 1080, 1948),
        (333, 500, 1476),
        (500, 333, 1464),
    ],
)
@pytest.mark.parametrize("compat", ["llava", "hf"])
def test_published_row_counts(width, height, rows, compat):
    assert count_image_rows(NEXT.read_as(compat), height, width) == rows


def test_published_row_counts_of_other_variants():
    assert count_image_rows(SIGLIP, 1080, 1920) == 7269
    assert count_image_rows(SIGLIP, 2304, 2304) == 7371
    hd = VisualGeometry(224, 14, "anyres", ((672, 448),), "llava", "spatial_unpad")
    assert count_image_rows(hd, 448, 672) == 1824
    single = dataclasses.replace(NEXT, aspect="pad")
    assert count_image_rows(single, 480, 640) == 577
    pooled = dataclasses.replace(NEXT, video_pool="average")
    assert len(video_rows(pooled, 16)) == 2304
    assert len(video_rows(pooled, 56)) == 8064


def sizes(seed: int, count: int, most: int) -> list[tuple[int, int]]:
    """Random (height, width), half of them of even logarithm so that extreme shapes are common."""
    rng = np.random.default_rng(seed)
    flat = rng.integers(1, most + 1, (count // 2, 2))
    steep = np.exp(rng.uniform(0, math.log(most), (count - count // 2, 2))).astype(int) + 1
    return [(int(h), int(w)) for h, w in np.concatenate([flat, steep])]


EDGES = [(1, 1), (1, 4000), (4000, 1), (2, 10000), (10000, 2), (335, 337), (336, 337), (672, 673), (88, 55), (55, 176)]
COUNTED = {
    "next": (tiny.Case("llava_next", tile=336, patch=14, pinpoints=PINPOINTS), 14000, 3000),
    "next one canvas": (tiny.Case("llava_next", tile=336, patch=14, pinpoints=((672, 672),)), 2000, 2000),
    "next odd side": (tiny.Case("llava_next", tile=70, patch=14, pinpoints=tiny._grid(70, 3)), 3000, 1000),
    "onevision": (
        tiny.Case(
            "llava_onevision",
            tile=384,
            patch=14,
            pinpoints=tiny._grid(384, 6),
            options={"vision_aspect_ratio": "anyres_max_9"},
        ),
        1500,
        4000,
    ),
    "onevision small": (
        tiny.Case(
            "llava_onevision",
            tile=98,
            patch=14,
            pinpoints=tiny._grid(98, 4),
            options={"vision_aspect_ratio": "anyres_max_2"},
        ),
        3000,
        1000,
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_transformers_processors(name):
    """23,500 sizes over the five lists, extremes among them."""
    case, count, most = COUNTED[name]
    processor = tiny.hf_processor(case)
    most_tiles = case.options.get("vision_aspect_ratio")
    geometry = VisualGeometry(
        case.tile,
        case.patch,
        "anyres",
        case.pinpoints,
        "hf",
        "spatial_unpad",
        max_tiles=int(most_tiles.removeprefix("anyres_max_")) if most_tiles else None,
    )
    drop = 1 if case.kind == "llava_next" else 0
    for height, width in EDGES + sizes(0, count, most):
        expected = processor._get_number_of_features(height, width, case.tile, case.tile) - drop
        assert count_image_rows(geometry, height, width) == expected, (height, width)


def test_an_image_of_no_pixels_is_refused():
    for height, width in ((0, 5), (5, 0), (-1, 3)):
        with pytest.raises(ImageError, match="at least 1x1"):
            count_image_rows(NEXT, height, width)
    with pytest.raises(ImageError, match="no frames"):
        video_rows(NEXT, 0)


# ---------------------------------------------------------------- pinpoints


def test_pinpoints_are_read_in_every_form():
    product = parse_pinpoints("(1x1),...,(2x3)", 10)
    assert product == ((10, 10), (10, 20), (10, 30), (20, 10), (20, 20), (20, 30))
    assert len(parse_pinpoints("(1x1),...,(6x6)", 384)) == 36
    assert parse_pinpoints("[(336, 672), (672, 336)]", 336) == ((336, 672), (672, 336))
    assert parse_pinpoints([[336, 672], (672, 336)], 336) == ((336, 672), (672, 336))
    assert parse_pinpoints("224,448", 224) == ((224, 224), (448, 448))
    for wrong in ("wide", "(1x1),(6x6)", "[(336, 672), (672)]", ""):
        with pytest.raises(ImageError, match="image_grid_pinpoints"):
            parse_pinpoints(wrong, 336)


def test_impossible_geometries_are_refused():
    with pytest.raises(ImageError, match="needs image_grid_pinpoints"):
        VisualGeometry(336, 14, "anyres")
    with pytest.raises(ImageError, match="not a multiple"):
        VisualGeometry(336, 14, "anyres", ((300, 336),))
    with pytest.raises(ImageError, match="patches"):
        VisualGeometry(8, 14)
    with pytest.raises(ImageError, match="class row"):
        image_rows(dataclasses.replace(NEXT, class_rows=1), 500, 500)


def test_small_images_tie_and_each_reading_takes_its_own_first():
    """PARITY: with both sides at most 336 the two readings of the same list choose opposite grids."""
    for height, width in ((336, 336), (100, 100), (1, 1)):
        assert image_views(NEXT, height, width)[1].canvas == (672, 336)
        assert image_views(NEXT.read_as("hf"), height, width)[1].canvas == (336, 672)


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_swapping_pinpoints_between_the_readings_keeps_the_tiling(height, width):
    swapped = dataclasses.replace(NEXT, compat="hf", pinpoints=tuple((b, a) for a, b in PINPOINTS))
    assert image_views(swapped, height, width) == image_views(NEXT, height, width)


def test_unpadding_rounds_as_each_code_does():
    differ = [(w, h) for w, h in ((88, 55), (55, 176)) if _kept(w, h, "hf") != _kept(w, h, "llava")]
    assert differ == [(88, 55), (55, 176)]


def _kept(width, height, compat):
    canvas = image_views(NEXT, height, width)[1].canvas
    return unpad(height, width, (canvas[0] // 14, canvas[1] // 14), compat)


# ---------------------------------------------------------------- views


@settings(max_examples=300)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([NEXT, NEXT.read_as("hf"), SIGLIP]))
def test_the_image_lies_centred_in_its_canvas_with_its_aspect(height, width, geometry):
    base, tiled = image_views(geometry, height, width)
    assert base.size == base.canvas == (geometry.tile_size,) * 2
    assert base.offset == (0, 0)
    (h, w), (canvas_h, canvas_w) = tiled.size, tiled.canvas
    assert (canvas_h, canvas_w) in geometry.canvases
    assert 1 <= h <= canvas_h
    assert 1 <= w <= canvas_w
    assert h == canvas_h or w == canvas_w
    assert tiled.offset == ((canvas_h - h) // 2, (canvas_w - w) // 2)
    scale = min(canvas_h / height, canvas_w / width)
    assert abs(h - height * scale) <= 1
    assert abs(w - width * scale) <= 1
    tiles = 1 + canvas_h * canvas_w // geometry.tile_size**2
    assert image_rows(geometry, height, width).tiles == tiles


def test_single_tile_views():
    crop = image_views(VisualGeometry(336, 14, "crop"), 400, 900)[0]
    assert crop.size == (336, 756)
    assert crop.offset == (0, -210)
    assert crop.canvas == (336, 336)
    pad = image_views(VisualGeometry(336, 14, "pad", pad_color=(1, 2, 3)), 400, 900)[0]
    assert pad.square
    assert pad.fill == (1, 2, 3)
    assert pad.size == (336, 336)
    onevision = dataclasses.replace(SIGLIP, multi_image_anyres=False, pad_color=(4, 5, 6))
    several = image_views(onevision, 400, 900, alone=False)
    assert len(several) == 1
    assert several[0].square
    assert several[0].fill == (4, 5, 6)
    assert len(image_rows(onevision, 400, 900, alone=False)) == 27 * 27 + 1
    high = image_views(VisualGeometry(224, 14, "highres", ((448, 448), (672, 672))), 400, 900)
    assert [view.canvas for view in high] == [(224, 224), (672, 672)]
    assert high[1].square
    assert not high[0].square
    frames = dataclasses.replace(NEXT, frame_aspect="crop")
    assert frame_views(frames, 400, 900) == (crop,)
    assert frame_views(NEXT, 400, 900)[0].size == (336, 336)


# ---------------------------------------------------------------- merges, on tensors


def by_plan(rows: VisualRows, features: torch.Tensor, newline: torch.Tensor, project) -> torch.Tensor:
    """Run a plan by hand: features [tiles, rows per tile, width] to the rows that reach the decoder."""
    plan = build_plan([[VisualPiece(rows)]], features.shape[1])
    flat = features.flatten(0, 1)
    tables = [flat[plan.column("kept").astype(np.int64)]]
    for stage in ("before", "after"):
        source = flat
        if stage == "after":
            tables = [source := project(torch.cat(tables))]
        for pool in (pool for pool in plan.pools if pool.stage == stage):
            taps = source[torch.from_numpy(plan.column(pool.index).astype(np.int64))]
            weight = torch.from_numpy(plan.column(pool.weight).copy()).view(torch.float32)
            tables.append(taps.amax(1) if pool.reduce == "max" else (taps * weight[..., None]).sum(1))
    table, source = torch.cat(tables), plan.column("source")
    out = torch.full((plan.rows, table.shape[1]), torch.nan)
    out[source == VISUAL] = table[plan.column("row")[source == VISUAL].astype(np.int64)]
    out[source == CONSTANT] = newline
    return out


def merged(features, newline, merge, grid, height, width, compat, max_tiles=None):
    """What the original code does to projected features [tiles, side * side, width]: reshape, permute, unpad,
    interpolate or pool, append newlines (LLaVA-NeXT df17966, llava_arch.py, restated)."""
    base, rest = features[0], features[1:]
    side = math.isqrt(features.shape[1])
    if not merge.startswith("spatial"):
        return features.flatten(0, 1)
    picture = rest.view(*grid, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    if "maxpool2x2" in merge:
        picture = F.max_pool2d(picture, 2)
    elif "unpad" in merge:
        rows, cols = picture.shape[1:]
        if width / height > cols / rows:
            new = height * (cols / width)
            new = int(round(new, 7)) if compat == "hf" else int(new)
            cut = (rows - new) // 2
            picture = picture[:, cut : rows - cut]
        else:
            new = width * (rows / height)
            new = int(round(new, 7)) if compat == "hf" else int(new)
            cut = (cols - new) // 2
            picture = picture[:, :, cut : cols - cut]
        rows, cols = picture.shape[1:]
        times = math.sqrt(rows * cols / (max_tiles * side**2)) if max_tiles else 0
        if times > 1.1:
            picture = F.interpolate(picture[None], [int(rows // times), int(cols // times)], mode="bilinear")[0]
        picture = torch.cat([picture, newline[:, None, None].expand(-1, picture.shape[1], 1)], dim=2)
    lines = picture.flatten(1, 2).T
    return lines if "nobase" in merge else torch.cat([base, lines])


def with_dropped_row(features: torch.Tensor, dropped: int) -> torch.Tensor:
    """What a tower gives whose class row is left out: [tiles, rows, width] with NaN in front, which would show."""
    return torch.cat([torch.full((len(features), dropped, features.shape[2]), torch.nan), features], dim=1)


MERGES = ["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2", "spatial_unpad_nobase", "spatial_maxpool2x2_nobase"]
SHAPES = [(60, 90), (200, 31), (31, 200), (1, 300), (300, 1), (98, 98), (500, 499), (7, 5)]


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("patch", [14, 20])
@pytest.mark.parametrize("compat", ["hf", "llava"])
@pytest.mark.parametrize(("merge", "max_tiles"), [(m, None) for m in MERGES] + [("spatial_unpad", n) for n in (1, 2)])
def test_merges_equal_the_original_on_tensors(merge, max_tiles, compat, patch, dropped):
    """Sides of 7 and 4 patches; the projector is nonlinear, so pooling on its wrong side would show."""
    grid = tiny._grid(98, 3)
    geometry = VisualGeometry(98, patch, "anyres", grid, compat, merge, max_tiles, dropped_rows=dropped)
    newline = torch.randn(5)
    for height, width in SHAPES:
        rows = image_rows(geometry, height, width)
        canvas = image_views(geometry, height, width)[1].canvas
        features = torch.randn(rows.tiles, geometry.rows_per_tile, 5)
        got = by_plan(rows, with_dropped_row(features, dropped), newline, torch.exp)
        grid = (canvas[0] // 98, canvas[1] // 98)
        expected = merged(features.exp(), newline, merge, grid, height, width, compat, max_tiles)
        assert got.shape == expected.shape == (len(rows), 5)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


CLASS_ROWS = [(0, 0), (1, 0), (0, 1)]  # kept, dropped


@pytest.mark.parametrize(("class_rows", "dropped"), CLASS_ROWS)
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_a_single_tile_keeps_all_its_rows(merge, class_rows, dropped):
    geometry = VisualGeometry(98, 14, "pad", merge=merge, class_rows=class_rows, dropped_rows=dropped)
    features, newline = torch.randn(1, 49 + class_rows, 5), torch.randn(5)
    rows = image_rows(geometry, 30, 50)
    got = by_plan(rows, with_dropped_row(features, dropped), newline, torch.exp)
    expected = features[0].exp()
    if "unpad" in merge:
        expected = torch.cat([expected, newline[None]])
    assert torch.equal(got, expected)


def pooled_video(features, newline, pool, stride, stage, position, project):
    """LLaVA-NeXT's get_2dPool and newline positions on [frames, side * side, width], restated."""
    side = math.isqrt(features.shape[1])

    def shrink(x):
        picture = x.view(len(x), side, side, -1).permute(0, 3, 1, 2)
        if pool == "average":
            picture = F.avg_pool2d(picture, stride)
        elif pool == "max":
            picture = F.max_pool2d(picture, stride)
        elif pool == "bilinear":
            picture = F.interpolate(picture, size=[math.ceil(side / stride)] * 2, mode="bilinear")
        return picture.permute(0, 2, 3, 1)  # [frames, rows, cols, width]

    lines = project(shrink(features)) if stage == "before" else shrink(project(features))
    frames, rows = lines.shape[:2]
    if position == "grid":
        lines = torch.cat([lines, newline.expand(frames, rows, 1, -1)], dim=2)
    lines = lines.flatten(1, 2)
    if position == "frame":
        lines = torch.cat([lines, newline.expand(frames, 1, -1)], dim=1)
    lines = lines.flatten(0, 1)
    return torch.cat([lines, newline[None]]) if position == "one_token" else lines


@pytest.mark.parametrize(("class_rows", "dropped"), CLASS_ROWS)
@pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize(
    ("pool", "stride"), [("none", 2), ("average", 2), ("average", 3), ("max", 2), ("bilinear", 2), ("bilinear", 4)]
)
def test_video_pooling_and_newlines_equal_the_original_on_tensors(pool, stride, stage, position, class_rows, dropped):
    newline = torch.randn(5)
    for patch in (14, 16):  # sides of 7 and 6 patches
        geometry = VisualGeometry(
            98,
            patch,
            class_rows=class_rows,
            dropped_rows=dropped,
            video_pool=pool,
            video_pool_stride=stride,
            video_pool_stage=stage,
            video_newline=position,
        )
        features = torch.randn(3, geometry.rows_per_tile, 5)
        rows = video_rows(geometry, 3)
        got = by_plan(rows, with_dropped_row(features, dropped), newline, torch.exp)
        expected = pooled_video(features[:, class_rows:], newline, pool, stride, stage, position, torch.exp)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_only_rows_that_reach_the_decoder_are_projected():
    """transformers projects 2,880 rows of either image (PARITY)."""
    for width, height, kept in ((1280, 720, 1920), (640, 480, 2304)):
        plan = build_plan([[VisualPiece(image_rows(NEXT, height, width))]], NEXT.rows_per_tile)
        assert len(plan.column("kept")) == kept
        assert plan.tiles == 5
