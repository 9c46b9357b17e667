"""Reading of the images and videos in a request: data URIs and, if the server allows them, files and URLs."""

from __future__ import annotations

import base64
import binascii
import os
import threading
import time
import urllib.parse
from pathlib import Path

from llava_fast.errors import ImageError
from llava_fast.inputs.options import VIDEO_FRAMES
from llava_fast.inputs.pictures.reading import OPEN_FORMATS, open_header
from llava_fast.inputs.pictures.video import CONTAINERS, FrameRate, VideoFrames, take_frames
from llava_fast.serve.errors import ApiError, check_wanted
from llava_fast.serve.remote import fetch
from llava_fast.serve.settings import Settings


class Media:
    """Reads the images and videos of one request, given as image_url or video_url, within the limits of the settings.
    The methods block, so call them in the pool. They raise ApiError if reading is not allowed or `gone` is set, and
    ImageError if it fails."""

    def __init__(self, settings: Settings, gone: threading.Event, frames: int | FrameRate | None = None) -> None:
        """frames: which frames of a video are used; default: the settings' number, or 16."""
        self.settings, self.gone, self.frames = settings, gone, frames or settings.video_frames or VIDEO_FRAMES
        self.remote_seconds = settings.remote_seconds  # left for what is still to be fetched
        self.folders = [Path(folder).resolve() for folder in settings.allow_files]

    def check_number(self, images: int) -> None:
        if images > self.settings.max_images:
            raise ApiError(
                400, f"the messages hold {images} images and a request takes {self.settings.max_images}", "messages"
            )

    def image(self, url: str) -> bytes:
        """Return the encoded bytes of an image file. Its size in pixels is checked."""
        data = self._read(url)
        image, _ = open_header(data, OPEN_FORMATS)
        with image:
            self._check_pixels(image.height, image.width)
        return data

    def video(self, url: str) -> VideoFrames:
        """Return the sampled frames of a video file. The size of its frames is checked."""
        data = self._read(url)

        def check(height: int, width: int, used: int) -> None:
            check_wanted(self.gone)
            self._check_pixels(height, width, used)

        return take_frames(data, self.frames, self.settings.max_frames, check, CONTAINERS)

    def _check_pixels(self, height: int, width: int, number: int = 1) -> None:
        if number * height * width > self.settings.max_pixels:
            what = f"an image of {width}x{height}" if number == 1 else f"{number} frames of {width}x{height}"
            raise ApiError(400, f"{what} pixels: this server takes {self.settings.max_pixels} pixels", "messages")

    def _read(self, url: str) -> bytes:
        check_wanted(self.gone)
        scheme = url[:20].partition(":")[0].lower()
        if scheme == "data":
            return _data_uri(url)
        if scheme in ("http", "https"):
            return self._fetched(url)
        if scheme == "file" or "/" in url[:2000]:
            return self._file(url)
        raise ApiError(400, "an image_url or video_url must be a data URI: data:image/jpeg;base64,...", "messages")

    def _fetched(self, url: str) -> bytes:
        settings, began = self.settings, time.monotonic()
        try:
            return fetch(url, settings.allow_remote, settings.max_remote_bytes, self.remote_seconds, self.gone)
        finally:
            self.remote_seconds -= time.monotonic() - began

    def _file(self, url: str) -> bytes:
        """Read a file whose path, with symbolic links resolved, is below an allowed folder. The error is the same for
        a missing file and a forbidden one."""
        name = urllib.parse.unquote(url[len("file://") :]) if url.lower().startswith("file://") else url
        try:
            path = Path(name).resolve(strict=True)
            if path.is_file() and any(path.is_relative_to(folder) for folder in self.folders):
                if path.stat().st_size > self.settings.max_body_bytes:
                    raise ApiError(400, f"the file is larger than {self.settings.max_body_bytes} bytes", "messages")
                with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                    return file.read(self.settings.max_body_bytes + 1)
        except (OSError, ValueError, RuntimeError):  # missing, a null byte in the path, a loop of links
            pass
        raise ApiError(
            403,
            "local files are read only below the folders that the server was started with (--allow-files)",
            "messages",
        )


def _data_uri(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError('a data URI has no comma before its data: write "data:image/png;base64,..."')
    if not header.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode(payload)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"a data URI is not valid base64: {error}") from None
