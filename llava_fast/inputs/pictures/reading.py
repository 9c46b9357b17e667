"""Reads images from paths, bytes, data URIs, PIL images and arrays into uint8 arrays."""

from __future__ import annotations

import base64
import binascii
import io
import os
import urllib.parse
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from llava_fast.errors import ImageError, MissingFileError

OPEN_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are safe for untrusted files: Pillow decodes them itself (EPS runs Ghostscript), and their headers state
the decoded size (ICO's may not)."""


def open_image(
    source: Any,
    exif: bool = True,
    alpha: Literal["drop", "white"] = "drop",
    formats: tuple[str, ...] | None = None,
) -> np.ndarray:
    """The pixels of an image as uint8 [height, width, 3], C-contiguous; may be read-only or shared with `source`.

    source  a path (str or PathLike), the bytes of a file, a `data:` URI, a PIL image, or a uint8 array [H, W],
            [H, W, 3] or [H, W, 4].
    exif    apply a file's EXIF orientation, as transformers' load_image does (the original LLaVA does not). PIL images
            and arrays are never rotated, as in transformers' processors.
    alpha   "drop" ignores transparency: PIL's convert("RGB"), which the original LLaVA and transformers' load_image
            use. "white" blends onto white, like transformers 5.23 (image_transforms.convert_to_rgb) for PIL images and
            arrays that are passed to a processor.
    formats the allowed Pillow formats of a file (None: all).
    Raises ImageError for anything that cannot be read, FileNotFoundError for a missing file, TypeError for another
    type of source.
    """
    if alpha not in ("drop", "white"):
        raise ValueError(f'alpha must be "drop" or "white", not {alpha!r}')
    if isinstance(source, np.ndarray):
        return _from_array(source, alpha)
    if isinstance(source, Image.Image):
        return _from_pil(source, f"PIL image ({source.mode}, {source.width}x{source.height})", False, alpha)
    image, name = open_header(source, formats)
    with image:
        return _from_pil(image, name, exif, alpha)


def open_header(source: Any, formats: tuple[str, ...] | None = None) -> tuple[Image.Image, str]:
    """A path, bytes or data URI as a PIL image whose header only is read, and its name for errors. `formats` and the
    exceptions are those of `open_image`."""
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise TypeError(f"an image is a path, bytes, data URI, PIL image or uint8 array, not {type(source).__name__}")
    name = source_name(source)
    file = source_file(source, name)
    try:
        return Image.open(file, formats=formats), name
    except Image.UnidentifiedImageError:
        kinds = "that Pillow reads" if formats is None else f"read here ({', '.join(formats)})"
        raise ImageError(f"{name} is not an image in a format {kinds}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's format plugins raise many types
        raise ImageError(f"{name} cannot be read: {error}") from error


def source_name(source: Any) -> str:
    """The name of an image or video in errors."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the image or video given as {len(source)} bytes"
    if isinstance(source, str) and source.startswith("data:"):
        return f"the data URI of {len(source)} characters"
    text = os.fsdecode(source)
    return repr(text if len(text) <= 200 else text[:200] + "...")


def source_file(source: Any, name: str) -> Any:
    """A path, or the bytes as a file object. Raises ImageError and MissingFileError."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        data = _decode_data_uri(source, name)
    else:
        path = os.fsdecode(source)
        if path.lower().startswith(("http://", "https://")):
            raise ImageError(f"{name} is a web address, which is not fetched: download it and give the path or bytes")
        if not os.path.exists(path):
            raise MissingFileError(f"no image or video file {name}")
        if os.path.isdir(path):
            raise ImageError(f"{name} is a folder, not an image or video file")
        if os.path.getsize(path) == 0:
            raise ImageError(f"{name} is empty (0 bytes)")
        return path
    if not data:
        raise ImageError(f"{name} is empty")
    return io.BytesIO(data)


def _decode_data_uri(uri: str, name: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(f'{name} has no comma before its data: write "data:image/png;base64,..."')
    raw = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return raw
    try:
        return base64.b64decode(raw)
    except binascii.Error as error:
        raise ImageError(f"{name} is not valid base64: {error}") from None


def _from_array(image: np.ndarray, alpha: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        raise ImageError(
            f"an image array must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {image.dtype} {list(image.shape)}"
        )
    if 0 in image.shape:
        raise ImageError(f"the image array has no pixels: its shape is {list(image.shape)}")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    elif image.shape[2] == 4 and alpha == "white":
        opacity = image[..., 3:] / 255
        image = np.round(opacity * image[..., :3] + (1 - opacity) * 255).astype(np.uint8)
    return np.ascontiguousarray(image[..., :3])


def require_rgb(source: Any) -> None:
    """Raise ImageError for a PIL image or an array whose channels are not RGB."""
    mode = source.mode if isinstance(source, Image.Image) else "RGB" if np.shape(source)[2:] == (3,) else "another"
    if mode != "RGB":
        raise ImageError(
            f"the image's mode is {mode}, and the checkpoint does not convert it (do_convert_rgb is false)"
        )


def check_pixels(width: int, height: int, name: str) -> None:
    """Raise ImageError for an image without pixels or with more than Pillow's limit."""
    pixels, limit = width * height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ImageError(
            f"{name} has {pixels} pixels, the limit is {limit}: shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    if pixels == 0:
        raise ImageError(f"{name} has no pixels")


def _from_pil(image: Image.Image, name: str, exif: bool, alpha: str) -> np.ndarray:
    check_pixels(image.width, image.height, name)
    try:
        image.load()
        check_pixels(image.width, image.height, name)  # again, since the header may state another size
        if exif:
            image = ImageOps.exif_transpose(image)
        if alpha == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # truncated or corrupt data: Pillow's decoders raise many types
        raise ImageError(f"{name} cannot be decoded: {error}") from error
