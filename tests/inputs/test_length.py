"""Counting a sample's rows without opening its images, and cutting a sample that is too long."""

import dataclasses
import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from llava_fast.errors import ImageError, MissingFileError, RequestError
from llava_fast.inputs.pictures.headers import image_size
from llava_fast.inputs.pictures.reading import open_image
from llava_fast.inputs.plan.columns import MODALITY_TEXT
from llava_fast.inputs.plan.length import RowCounts, count_rows, fit
from llava_fast.inputs.plan.plan import TextPiece, build_plan, sequence_length
from llava_fast.inputs.prepared import Placeholder
from tests.support import made_videos, tiny

# ---------------------------------------------------------------- sizes from headers


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(kind: str, orientation: int, height: int = 40, width: int = 90) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(tiny.picture(height, width)), kind, exif=exif)


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_size_of_a_turned_file_is_that_of_its_pixels(kind, orientation, exif):
    data = turned(kind, orientation)
    assert image_size(data, exif) == open_image(data, exif).shape[:2]
    if kind != "TIFF":  # Pillow turns a TIFF whatever is asked
        assert (image_size(data, exif) == (90, 40)) == (exif and orientation > 4)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PPM", "ICO", "TGA", "PCX"])
def test_size_of_other_files(kind):
    data = encoded(Image.fromarray(tiny.picture(32, 64)), kind)
    assert image_size(data) == open_image(data).shape[:2]


def test_size_of_a_png_whose_orientation_follows_its_pixels():
    data = turned("PNG", 6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.index(b"IEND") - 4
    moved = data[:start] + data[end:last] + data[start:end] + data[last:]
    assert image_size(moved) == open_image(moved).shape[:2] == (90, 40)
    assert image_size(moved, exif=False) == (40, 90)


def test_size_of_a_png_with_its_orientation_in_xmp():
    note = PngImagePlugin.PngInfo()
    note.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    data = encoded(Image.fromarray(tiny.picture(40, 90)), "PNG", pnginfo=note)
    assert image_size(data) == open_image(data).shape[:2] == (90, 40)


def test_size_of_pixels_and_of_pictures():
    assert image_size(tiny.picture(3, 5)) == (3, 5)
    assert image_size(tiny.picture(3, 5)[..., 0]) == (3, 5)
    assert image_size(Image.open(io.BytesIO(turned("JPEG", 6)))) == (40, 90)  # never turned


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_no_pixel_is_decoded(kind, monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(tiny.picture(40, 90)), kind))

    def fail(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", fail)
    assert image_size(tmp_path / "a") == (40, 90)


def test_bad_files_are_what_opening_them_says(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match="nowhere"):
        image_size(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="not an image"):
        image_size(b"hello")
    with pytest.raises(TypeError, match="not int"):
        image_size(3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with (
        pytest.raises(ImageError, match="3600 pixels, the limit is 3000"),
        pytest.warns(Image.DecompressionBombWarning),
    ):
        image_size(turned("JPEG", 1))


# ---------------------------------------------------------------- counts are the plan's

QUESTION = [{"role": "user", "content": "<image>\nWhat is the hello?"}, {"role": "assistant", "content": "the hello"}]
SAMPLES = {
    "text": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the hello"}]},
    "image": {"messages": QUESTION, "images": [tiny.picture(60, 90)]},
    "turned jpeg": {"messages": QUESTION, "images": [turned("JPEG", 6, 31, 200)]},
    "turned png": {"messages": QUESTION, "images": [turned("PNG", 8, 200, 31)]},
    "several": {
        "messages": [{"role": "user", "content": "<image> <image>\n<image>"}, QUESTION[1]],
        "images": [turned("JPEG", 5, 31, 200), tiny.picture(60, 90), turned("WEBP", 3)],
    },
}
VIDEO = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "And?"}]}, QUESTION[1]]


@pytest.fixture(scope="module")
def video_file(tmp_path_factory):
    frames = [tiny.picture(48, 64, number) for number in range(5)]
    return made_videos.write(tmp_path_factory.mktemp("video") / "clip.mp4", frames)


@pytest.mark.parametrize("labels", [False, "answers", "original"])
@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("model", ["llava15", "next", "onevision", "video"])
def test_counts_are_the_plans(model, exif, labels, video_file):
    processor = dataclasses.replace(tiny.pair(model).ours.processor, exif=exif)
    samples = dict(SAMPLES)
    if model in ("onevision", "video"):
        samples["video"] = {"messages": VIDEO, "video": str(video_file)}
        samples["frames"] = {"messages": VIDEO, "video": np.stack([tiny.picture(20, 30)] * 3)}
        timed = dataclasses.replace(processor, time_instruction=True)
        assert timed.count(samples["video"], labels).text > processor.count(samples["video"], labels).text + 100
        assert timed.count(samples["video"], labels).all == timed.prepare([samples["video"]], labels=labels).plan.rows
    for name, sample in samples.items():
        plan = processor.prepare([sample], labels=labels).plan
        text = int((plan.column("modality") == MODALITY_TEXT).sum())
        expected = RowCounts(text, plan.rows - text, len(plan.column("supervised_row")))
        assert processor.count(sample, labels) == expected, name
        assert expected.all == plan.rows
        assert bool(labels) == (expected.supervised > 0)


def test_turning_a_file_changes_its_count():
    """Else the test above could not see EXIF forgotten."""
    processor = tiny.pair("next").ours.processor
    sideways = dataclasses.replace(processor, exif=False)
    sample = {"prompt": "<image>", "images": [turned("JPEG", 6, 56, 150)]}
    upright, as_stored = (each.count(sample) for each in (processor, sideways))
    assert upright.text == as_stored.text
    assert upright.visual != as_stored.visual


def test_a_label_on_the_first_row_is_no_target():
    piece = TextPiece(np.arange(3), np.array([True, False, True]))
    assert count_rows([piece], [3]) == RowCounts(3, 0, 1)
    assert count_rows([TextPiece(np.arange(0), np.zeros(0, bool)), piece], [0, 3]).supervised == 1
    assert count_rows([Placeholder("<image>", None, True), piece], [7, 3]) == RowCounts(3, 7, 2)
    assert count_rows([], []) == RowCounts(0, 0, 0)


def test_a_bad_request_has_no_count():
    processor = tiny.pair("next").ours.processor
    with pytest.raises(RequestError, match="1 <image> placeholders and 0"):
        processor.count({"prompt": "<image>"})
    with pytest.raises(RequestError, match="not int"):
        processor.count({"prompt": "<image>", "images": [3]})
    long = processor.count({"prompt": "x" * 5000})  # over its context, and counted all the same
    assert long.text == 5001


# ---------------------------------------------------------------- the length policy

IMAGE = Placeholder("<image>", "not opened", True)


def text(labels: str) -> TextPiece:
    """A piece of one token a letter: "x" carries a label."""
    return TextPiece(np.arange(len(labels)), np.array([letter == "x" for letter in labels]))


def written(parts) -> str:
    return "".join("I" if part is IMAGE else "".join("-x"[int(flag)] for flag in part.supervised) for part in parts)


@pytest.mark.parametrize(
    ("max_rows", "kept"),
    [
        (19, "--I-xx-I-xx-"),
        (18, "--I-xx-I-xx"),
        (16, "--I-xx-I-"),
        (15, "--I-xx-I"),
        (14, "--I-xx-"),  # the second image does not fit whole
        (11, "--I-xx-"),
        (10, "--I-xx"),
        (9, "--I-x"),
        (8, None),  # nothing left to learn from
        (6, None),
        (1, None),
        (0, None),
    ],
)
def test_cut_by_hand(max_rows, kept):
    parts, rows = [text("--"), IMAGE, text("-xx-"), IMAGE, text("-xx-")], [2, 5, 4, 4, 4]
    cut = fit(parts, rows, max_rows, "cut")
    assert (cut if cut is None else written(cut)) == kept
    assert (fit(parts, rows, max_rows, "drop") is None) == (max_rows < 19)


def test_what_fits_is_returned_as_it_is():
    parts = [text("--"), IMAGE]
    for policy in ("drop", "cut"):
        kept = fit(parts, [2, 5], 7, policy)
        assert all(one is other for one, other in zip(kept, parts, strict=True))
    with pytest.raises(ValueError, match="not 'keep'"):
        fit(parts, [2, 5], 7, "keep")


def test_a_label_on_the_first_row_alone_is_not_kept():
    assert fit([text("x---x")], [5], 4, "cut") is None
    assert written(fit([text("xx---")], [5], 4, "cut")) == "xx--"


@given(
    st.lists(st.one_of(st.integers(1, 9), st.text("-x", min_size=1, max_size=9)), min_size=1, max_size=8),
    st.integers(0, 40),
)
def test_a_cut_is_the_longest_beginning_that_halves_no_image(drawn, max_rows):
    parts = [IMAGE if isinstance(part, int) else text(part) for part in drawn]
    rows = [part if isinstance(part, int) else len(part) for part in drawn]
    kept = fit(parts, rows, max_rows, "cut")
    flat = "".join("I" * part if isinstance(part, int) else part for part in drawn)
    if len(flat) <= max_rows:
        assert kept is not None
        assert written(kept) == written(parts)
        return
    starts = np.cumsum([0, *rows])
    whole = [(a, b) for part, (a, b) in zip(parts, pairwise(starts), strict=True) if part is IMAGE]
    end = min([max_rows, *(a for a, b in whole if a < max_rows < b)])
    if "x" not in flat[:end][1:]:
        assert kept is None
        return
    lengths = [rows[i] if part is IMAGE else len(part.ids) for i, part in enumerate(kept)]
    assert sum(lengths) == end
    assert (
        "".join("I" * n if part is IMAGE else written([part]) for part, n in zip(kept, lengths, strict=True))
        == (flat[:end])
    )


def test_a_cut_before_images_are_opened_is_the_cut_of_the_plans_pieces():
    processor = tiny.pair("next").ours.processor
    sample = {
        "messages": [*QUESTION, {"role": "user", "content": "<image>"}, QUESTION[1]],
        "images": [turned("JPEG", 6), tiny.picture(60, 90)],
    }
    outline = processor.outline(sample, "answers")
    rows = processor.rows_of(outline)
    pieces = processor.pieces(outline, [])
    assert [sequence_length([piece]) for piece in pieces] == rows
    whole = build_plan([pieces], processor.geometry.tower_rows_per_tile)
    for max_rows in (sum(rows) - 3, sum(rows) - rows[-1] - 1):
        cut, tiles = fit(outline, rows, max_rows, "cut"), []
        plan = processor.assemble([processor.pieces(cut, tiles)], tiles).plan
        same = fit(pieces, rows, max_rows, "cut")
        assert plan.rows == sequence_length(same) <= max_rows
        assert plan.has_labels
        assert (plan.column("label") == whole.column("label")[: plan.rows]).all()
        assert len(tiles) == (2 if max_rows == sum(rows) - 3 else 1)
