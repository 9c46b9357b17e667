"""Canvases: disjoint scans, unambiguous reading order, legible ink, sizes and counts as promised."""

import numpy as np
import pytest

from llava_fast.demo import compose, split_scans
from llava_fast.demo.canvas import _scans

LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def canvases():
    rng = np.random.default_rng(7)
    train, _ = split_scans()
    return [compose(rng, train) for _ in range(400)]


def test_split_is_disjoint_complete_stratified_and_repeatable():
    train, held_out = split_scans(seed=3)
    assert sorted([*train, *held_out]) == list(range(1797))
    _, targets = _scans()
    for digit in range(10):
        share = (targets[held_out] == digit).sum() / (targets == digit).sum()
        assert 0.19 < share < 0.21
    assert np.array_equal(split_scans(seed=3)[0], train)
    assert not np.array_equal(split_scans(seed=4)[0], train)


def test_only_the_given_scans_are_written():
    _, targets = _scans()
    sevens = np.flatnonzero(targets == 7)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert set(compose(rng, sevens, count=4).digits) == {7}


def test_the_same_seed_gives_the_same_canvas():
    train, _ = split_scans()
    one, two = (compose(np.random.default_rng(5), train) for _ in range(2))
    assert np.array_equal(one.image, two.image)
    assert (one.digits, one.boxes) == (two.digits, two.boxes)


def test_counts_and_sizes_are_spread(canvases):
    counts = np.bincount([len(c.digits) for c in canvases], minlength=6) / len(canvases)
    assert 0.02 < counts[0] < 0.09
    assert (counts[1:] > 0.12).all()
    longer = np.array([max(c.image.shape[:2]) for c in canvases])
    aspects = np.array([c.image.shape[1] / c.image.shape[0] for c in canvases])
    assert longer.min() < 110
    assert longer.max() > 350
    assert longer.max() <= 402
    assert aspects.min() < 0.4
    assert aspects.max() > 2.5
    assert ((aspects > 0.7) & (aspects < 1.4)).mean() > 0.2
    assert all(c.image.dtype == np.uint8 and c.image.shape[2] == 3 for c in canvases)


def test_digits_are_written_where_the_boxes_say(canvases):
    for canvas in canvases:
        assert len(canvas.boxes) == len(canvas.digits)
        height, width, _ = canvas.image.shape
        for left, top, right, bottom in canvas.boxes:
            assert right - left >= 3
            assert bottom - top >= 5
            # Ink may be cut by a sliver at an edge, never by more.
            assert left > -0.15 * width
            assert top > -0.15 * height
            assert right < 1.15 * width
            assert bottom < 1.15 * height


def test_reading_order_is_unambiguous(canvases):
    """Each digit is either in its predecessor's line (overlapping in height, to the right) or wholly lower."""
    for canvas in canvases:
        centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in canvas.boxes]
        for before, after, (x0, y0), (x1, y1) in zip(
            canvas.boxes, canvas.boxes[1:], centres, centres[1:], strict=False
        ):
            same_line = x1 > x0 and before[1] < y1 < before[3] and after[1] < y0 < after[3]
            next_line = y1 > before[3] - 0.3 * (before[3] - before[1]) and y1 > y0
            assert same_line != next_line, (canvas.boxes, canvas.image.shape)


def test_the_first_digit_is_the_one_at_the_top_left(canvases):
    for canvas in canvases:
        corners = [(left + right) / 2 + (top + bottom) / 2 for left, top, right, bottom in canvas.boxes]
        assert all(corners[0] < other for other in corners[1:]), canvas.boxes


def test_ink_stands_out_from_its_surroundings(canvases):
    for canvas in canvases:
        luminance = canvas.image @ LUMA
        for left, top, right, bottom in canvas.boxes:
            patch = luminance[max(top, 0) : bottom, max(left, 0) : right]
            low, high = np.quantile(patch, [0.05, 0.95])
            assert high - low > 25, (canvas.boxes, low, high)


def test_empty_canvases_and_bad_arguments():
    train, _ = split_scans()
    rng = np.random.default_rng(0)
    empty = compose(rng, train, count=0)
    assert empty.digits == []
    assert empty.boxes == []
    with pytest.raises(ValueError, match="0 to 5"):
        compose(rng, train, count=6)
    with pytest.raises(ValueError, match="split_scans"):
        compose(rng, train[:0])


def test_aspect_and_plain_are_honoured():
    train, _ = split_scans()
    canvas = compose(np.random.default_rng(1), train, count=0, aspect=2.0, plain=True)
    height, width, _ = canvas.image.shape
    assert width == 2 * height
    assert canvas.image.max() < 60
