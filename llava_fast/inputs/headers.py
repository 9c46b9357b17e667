"""The size of an image and the frames of a video from what their files say first: no pixel is decoded.

Both agree with `images.open_image` and `images.read_video` wherever those succeed; a file that is truncated after its
header still has a size here.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from llava_fast.errors import ImageError
from llava_fast.inputs import images

FOLDER_RATE = 2.0
"""Frames a second of a folder of frames: what LLaVA-NeXT takes ShareGPTVideo's to have (llava/train/train.py)."""

_HEADER_SAYS_ALL = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP"}  # others are decoded: TIFF turns itself, icons choose
_TURNED = {5, 6, 7, 8}  # orientations whose sides change places
_PNG_NOTES = {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}  # the chunks an orientation may stand in


def image_size(source: Any, exif: bool = True) -> tuple[int, int]:
    """(height, width) of what `images.open_image(source, exif)` returns. Raises what it raises for a bad header."""
    if isinstance(source, (np.ndarray, Image.Image)):
        return _shape(images.open_image(source))
    image, name = images.open_header(source)
    with image:
        images.check_pixels(image.width, image.height, name)
        hidden = exif and isinstance(image, PngImageFile) and _notes_come_last(image.fp)
        if hidden or image.format not in _HEADER_SAYS_ALL:
            return _shape(images.open_image(source, exif))
        try:
            # PNG's own getexif decodes the image, to look for what comes after it.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) if exif else 1
        except Exception as error:  # a broken EXIF block: Pillow's parsers raise many kinds
            raise ImageError(f"{name} cannot be decoded: {error}") from error
        return (image.width, image.height) if orientation in _TURNED else (image.height, image.width)


def frame_count(source: Any, num_frames: int | None = None) -> int:
    """How many frames `images.read_video(source, num_frames)` returns. Raises what it raises for a missing file, one
    that is no video, or no frames. A video file of which all frames are wanted is decoded: its header may lie."""
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        if not images.frame_files(source):
            raise ImageError(f"the folder {images.source_name(source)} has no frames")
        return len(images.frame_files(source)) if num_frames is None else num_frames
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        if num_frames is None:
            return len(images.read_video(source))
        images.open_video(source).close()
        return num_frames
    if isinstance(source, np.ndarray) or not isinstance(source, Sequence) or not source:
        return len(images.read_video(source, num_frames))
    return len(source) if num_frames is None else num_frames


class VideoTimes(NamedTuple):
    """How long a video lasts, and when each of the frames taken from it is; seconds."""

    duration: float
    frames: list[float]


def video_times(source: Any, num_frames: int) -> VideoTimes:
    """When the frames of `images.read_video(source, num_frames)` are, from what a file's header says of its frames and
    their average rate: frame i at i / rate, as LLaVA-NeXT has it (process_video_with_decord in llava/utils.py). A
    folder of frames has FOLDER_RATE. Raises ImageError for a video without times, and what `frame_count` raises."""
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        total, rate = frame_count(source), FOLDER_RATE
    elif isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        total, rate = images.frames_and_rate(source)
    else:
        raise ImageError("frames given as images do not say when they are: give a video file or a folder of frames")
    return VideoTimes(total / rate, [int(number) / rate for number in images.uniform_frames(total, num_frames)])


def _shape(pixels: np.ndarray) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def _notes_come_last(file: Any) -> bool:
    """Whether a PNG has text or EXIF behind its pixels, where opening it does not look."""
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    pixels_seen = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if pixels_seen and kind in _PNG_NOTES:
            return True
        pixels_seen = pixels_seen or kind == b"IDAT"
        file.seek(length + 4, io.SEEK_CUR)  # and its checksum
    return False
