"""The size of an image from its file's header, without decoding pixels.

It equals the size from `open_image` if that succeeds. A file that is truncated after its header still has a size here.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from llava_fast.errors import ImageError
from llava_fast.inputs.pictures.reading import check_pixels, open_header, open_image

_HEADER_SAYS_ALL = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP"}  # others are decoded: TIFF may be rotated, ICO has many
_TURNED = {5, 6, 7, 8}  # orientations that swap width and height
_PNG_NOTES = {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}  # chunks that may contain an orientation


def image_size(source: Any, exif: bool = True) -> tuple[int, int]:
    """(height, width) of `open_image(source, exif)`. Raises the same errors for an invalid header."""
    if isinstance(source, (np.ndarray, Image.Image)):
        return _shape(open_image(source))
    image, name = open_header(source)
    with image:
        check_pixels(image.width, image.height, name)
        hidden = exif and isinstance(image, PngImageFile) and _notes_come_last(image.fp)
        if hidden or image.format not in _HEADER_SAYS_ALL:
            return _shape(open_image(source, exif))
        try:
            # The PNG plugin's getexif would decode the image to read the chunks after it.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) if exif else 1
        except Exception as error:  # an invalid EXIF block: Pillow's parsers raise many types
            raise ImageError(f"{name} cannot be decoded: {error}") from error
        return (image.width, image.height) if orientation in _TURNED else (image.height, image.width)


def _shape(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def _notes_come_last(file: Any) -> bool:
    """Whether a PNG has text or EXIF after its pixels, which are not read when it is opened."""
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    pixels_seen = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if pixels_seen and kind in _PNG_NOTES:
            return True
        pixels_seen = pixels_seen or kind == b"IDAT"
        file.seek(length + 4, io.SEEK_CUR)  # and its checksum
    return False
