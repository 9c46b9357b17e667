"""Every kind of image and video source reads, or fails with one clear error."""

import base64
import io
import random

import numpy as np
import pytest
from PIL import ExifTags, Image

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.headers import image_size
from llava_fast.inputs.pictures.reading import open_image


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_converts_as_pillow_does(mode):
    grey = Image.fromarray(noise(9, 12)[..., 0])
    image = grey.convert("I").convert("I;16") if mode == "I;16" else Image.fromarray(noise(9, 12)).convert("RGB")
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(grey)
    elif mode in ("LAB", "HSV"):
        image = Image.merge(mode, [grey, grey, grey])
    elif mode != "I;16":
        image = image.convert("L").convert(mode) if mode in ("1", "I", "F") else image.convert(mode)
    assert image.mode == mode
    pixels = open_image(image)
    assert pixels.shape == (9, 12, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def transparent_images():
    grey = Image.fromarray(noise(9, 12, seed=1)[..., 0])
    colour = Image.fromarray(noise(9, 12))
    with_alpha = colour.copy()
    with_alpha.putalpha(grey)
    indexed = colour.convert("P")
    palette = Image.open(io.BytesIO(encoded(indexed, transparency=indexed.getpixel((0, 0)))))
    chunk = Image.open(io.BytesIO(encoded(colour, transparency=colour.getpixel((0, 0)))))
    return {"RGBA": with_alpha, "LA": with_alpha.convert("LA"), "P": palette, "RGB": chunk}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_dropped_or_blended_onto_white(mode):
    """Dropped as in the original LLaVA and transformers' load_image; white as in its newer convert_to_rgb."""
    image = transparent_images()[mode]
    assert image.mode == mode
    dropped, white = open_image(image), open_image(image, alpha="white")
    np.testing.assert_array_equal(dropped, np.asarray(image.convert("RGB")))
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    blended = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert np.abs(white - blended).max() <= 1
    assert not np.array_equal(white, dropped)


def test_white_is_transformers_convert_to_rgb():
    transforms = pytest.importorskip("transformers.image_transforms")
    image = transparent_images()["RGBA"]
    if "white" not in (transforms.convert_to_rgb.__doc__ or ""):
        pytest.skip("this transformers drops transparency")
    for source in (image, np.asarray(image)):
        expected = transforms.convert_to_rgb(source, return_numpy=True)
        np.testing.assert_array_equal(open_image(source, alpha="white"), expected)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    expected = noise(20, 31)
    data = encoded(Image.fromarray(expected))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [path, str(path), data, bytearray(data), memoryview(data), uri, Image.fromarray(expected), expected]
    for source in sources:
        np.testing.assert_array_equal(open_image(source), expected)
    svg_style = "data:image/png," + "".join(f"%{byte:02x}" for byte in data)
    np.testing.assert_array_equal(open_image(svg_style), expected)


def test_arrays_of_other_channels():
    pixels = noise(5, 7)
    np.testing.assert_array_equal(open_image(pixels[..., 0]), np.repeat(pixels[..., :1], 3, axis=2))
    four = np.concatenate([pixels, pixels[..., :1]], axis=2)
    np.testing.assert_array_equal(open_image(four), pixels)
    assert open_image(four).flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_files_and_not_pil_images(orientation):
    image = Image.fromarray(noise(16, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    pixels = np.asarray(image)
    rotate = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]  # quarter turns, anticlockwise
    upright = np.rot90(pixels, rotate)
    if orientation in (2, 4, 5, 7):
        upright = upright[:, ::-1]
    np.testing.assert_array_equal(open_image(data), upright)
    np.testing.assert_array_equal(open_image(data, exif=False), pixels)
    np.testing.assert_array_equal(open_image(Image.open(io.BytesIO(data))), pixels)


def test_bad_files_are_one_clear_error(tmp_path):
    jpeg = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    png = encoded(Image.fromarray(noise(64, 64)))
    cases = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "cut.png": (png[: len(png) // 2], "cannot be decoded"),
        "head.png": (png[:20], "cannot be|not an image"),
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"hello, this is no image", "is not an image"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ImageError, match=message) as error:
            open_image(path)
        assert name in str(error.value)
        with pytest.raises(ImageError, match=f"{len(data)} bytes.*({message})"):
            open_image(data)


def test_other_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.png"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    for scheme in ("http", "https", "HTTPS"):
        with pytest.raises(ImageError, match=r"example.com/a.png.*download it"):
            open_image(f"{scheme}://example.com/a.png")
    with pytest.raises(ImageError, match="no comma"):
        open_image("data:image/png;base64")
    with pytest.raises(ImageError, match="not valid base64"):
        open_image("data:image/png;base64,abcde")
    with pytest.raises(ImageError, match=r"data URI.*is empty"):
        open_image("data:image/png;base64,")
    with pytest.raises(TypeError, match="not int"):
        open_image(3)
    with pytest.raises(ValueError, match="alpha must be"):
        open_image(noise(2, 2), alpha="black")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"\[3, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(ImageError, match=message):
        open_image(array)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [3999, 1500])  # where Pillow warns, and where it raises by itself
def test_too_many_pixels_are_refused(limit, monkeypatch):
    data = encoded(Image.new("RGB", (80, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=f"4000 pixels.*limit.*{limit if limit == 3999 else 2 * limit}"):
        open_image(data)
    with pytest.raises(ImageError, match=f"4000 pixels, the limit is {limit}"):
        open_image(Image.new("RGB", (80, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(data).shape == (50, 80, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of headers that lie
def test_five_hundred_mutated_images():
    """Bytes changed, left out and put in, in headers above all: pixels, or one clear error."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.fromarray(noise(24, 20))
    kinds = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "TGA"]
    whole = [encoded(picture, kind, exif=exif) for kind in kinds] + [encoded(picture.convert("P"))]
    chance, read = random.Random(0), 0
    for _ in range(500):
        raw = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(min(len(raw), 200) if chance.random() < 0.6 else len(raw))
            raw[place : place + chance.choice((0, 1, 1, 4))] = bytes(
                chance.choices(range(256), k=chance.choice((0, 1, 1, 3)))
            )
        for read_one in (open_image, image_size):
            try:
                read_one(bytes(raw))
                read += 1
            except ImageError as error:
                assert "\n" not in str(error)
    assert 100 < read < 900
