"""Thumbnails of the images for reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_fast.errors import ImageError
from llava_fast.evaluate.task import is_uri
from llava_fast.inputs.pictures.reading import open_image

FOLDER = "report/pictures"
SIDE = 360  # pixels of the longer side


def thumbnails(images: Iterable[Any], out: Path) -> list[str]:
    """Return the names of the images' thumbnails in OUT/report/pictures, and create missing ones. The name is "" if the
    image cannot be decoded.
    """
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    return [_thumbnail(image, out / FOLDER) for image in images]


def _thumbnail(image: Any, folder: Path) -> str:
    path = folder / f"{_name(image)}.jpg"
    if not path.exists():
        try:
            copy = Image.fromarray(open_image(image))
        except ImageError:
            return ""
        copy.thumbnail((SIDE, SIDE))
        copy.save(path, quality=85)
    return path.name


def _name(image: Any) -> str:
    found = hashlib.blake2b(digest_size=10)
    if isinstance(image, np.ndarray):
        found.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
    elif isinstance(image, bytes):
        found.update(image)
    elif is_uri(image):
        found.update(image.encode())
    else:
        path = Path(image)
        found.update(str(path.resolve()).encode())
        if path.exists():
            found.update(str(path.stat().st_mtime_ns).encode())
    return found.hexdigest()
