"""One row of a batch's input, and what every kind of input offers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from llava_fast.errors import MissingPackageError

Media = str | bytes
"""A path, a data URI, or the bytes of a file."""

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".flv", ".wmv")


@dataclass(frozen=True)
class Item:
    """A row of the input.

    number   its place, from 0.
    id       what its output row is called.
    columns  values that a prompt may name.
    error    why the row cannot be asked about; it then has no pictures.
    """

    number: int
    id: str | int
    columns: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Media, ...] = ()
    video: Media | None = None
    error: str | None = None


class Source(Protocol):
    """An input that can be read from any row on, always with the same rows. It can be pickled.

    files    the files that it reads, by absolute path; not those that a table's rows name.
    columns  names that a prompt may use; None: only the rows know.
    total    how many rows there are; None: unknown until the last is read.
    repeats  whether several rows may be about one picture.
    digest   changes with the input.
    remark   what of the input is not read, for the user ("": all is).
    """

    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> frozenset[str] | None: ...
    @property
    def total(self) -> int | None: ...
    @property
    def repeats(self) -> bool: ...
    @property
    def digest(self) -> str: ...
    @property
    def remark(self) -> str: ...

    def items(self, first: int = 0) -> Iterator[Item]:
        """The rows from number `first` on. Raises BatchError for an input that cannot be read on."""


def is_media(name: str) -> bool:
    """Whether a file is a picture or a video by its name."""
    return name.lower().endswith((*IMAGES, *VIDEOS))


def check_pyav() -> None:
    """Raises MissingPackageError without PyAV, which reads videos."""
    if importlib.util.find_spec("av") is None:
        raise MissingPackageError("a batch of videos", "PyAV", "video")
