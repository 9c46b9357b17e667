"""Tables as a batch's input: JSON lines, JSON lists, CSV, TSV and parquet, with a row for each question."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from llava_fast.batch.digest import digest, file_digest
from llava_fast.batch.items import Item, Media
from llava_fast.batch.readers import Problem, read_rows
from llava_fast.errors import BatchError

IMAGE_COLUMNS = ("image", "images", "image_path", "file_name", "filename", "path")
MOST_PATH = 4096  # characters; a longer text holds the picture itself
NUMBERED = "#"
"""Instead of the name of a column of ids: rows are numbered from 0."""


@dataclass(frozen=True)
class Table:
    """The rows of one or several files, in order; see items.Source.

    image, video  the columns with pictures and with a video (None: there is none): a path, a data URI, bytes, Hugging
                  Face's {"bytes", "path"}, or, of pictures, a list of these.
    id            the column with ids; None: rows are numbered.
    repeats       see items.Source; known of JSON and CSV, and False for parquet.
    folder        what relative paths are relative to; None: each file's own folder.
    """

    files: tuple[str, ...]
    columns: frozenset[str]
    total: int
    digest: str
    image: str | None
    video: str | None
    id: str | None
    folder: str | None
    repeats: bool
    remark: str = ""

    def items(self, first: int = 0) -> Iterator[Item]:
        number = 0
        for file in self.files:
            folder = os.path.dirname(file) if self.folder is None else self.folder
            for row in read_rows(file, max(0, first - number)):
                if isinstance(row, int):  # so many rows were skipped
                    number += row
                    continue
                yield self._item(number, row, folder)
                number += 1

    def _item(self, number: int, row: Mapping[str, Any] | Problem, folder: str) -> Item:
        if isinstance(row, Problem):
            return Item(number, number, error=str(row))
        name = number if self.id is None else row.get(self.id)
        if not is_id(name):
            return Item(number, number, error=f"the row's {self.id!r} is no text or whole number")
        try:
            images = _images(row.get(self.image), folder) if self.image else ()
            video = _media(row.get(self.video), folder) if self.video else None
        except TypeError as error:
            return Item(number, name, error=str(error))
        if not images and video is None:
            named = " and no ".join(repr(column) for column in (self.image, self.video) if column)
            return Item(number, name, error=f"the row has no {named}")
        return Item(number, name, {"id": name, **row}, images, video)


def open_table(
    files: list[str],
    image: str | None = None,
    video: str | None = None,
    id: str | None = None,
    folder: str | None = None,
) -> Table:
    """Columns that are not named: the first of IMAGE_COLUMNS, "video" and "id" that are there. Every row is read once,
    for the columns, the number of rows and ids that come twice. Raises BatchError."""
    columns: set[str] = set()
    ids: dict[Any, int] = {}
    pictures: set[str] = set()
    repeats = False
    total = 0
    numbered = id == NUMBERED
    for file in files:
        for row in read_rows(file, 0, columns_only=(id or "id",)):
            if isinstance(row, int):
                continue
            if not isinstance(row, Problem):
                columns |= row.keys()
                picture = row.get(image or next((each for each in IMAGE_COLUMNS if each in row), ""))
                if isinstance(picture, str):
                    repeats = repeats or picture in pictures
                    pictures.add(picture if len(picture) < MOST_PATH else "")
                name = row.get(id or "id")
                if not numbered and is_id(name) and ids.setdefault(name, total) != total:
                    raise BatchError(
                        f"rows {ids[name]} and {total} of {files[0] if len(files) == 1 else 'the input'} have one id, "
                        f"{name!r}: name another column with --id-column, or number the rows with --id-column "
                        f"'{NUMBERED}'"
                    )
            total += 1
    listed = ", ".join(sorted(columns)) or "none"
    for name in (image, video, None if numbered else id):
        if name is not None and name not in columns:
            raise BatchError(f"the input has no column {name!r}: its columns are {listed}")
    if not total:
        raise BatchError(f"{files[0] if len(files) == 1 else 'the input'} has no rows")
    image = image or next((name for name in IMAGE_COLUMNS if name in columns), None)
    video = video or ("video" if "video" in columns else None)
    if image is None and video is None:
        raise BatchError(f"no column holds pictures: name it with --image-column (the columns are {listed})")
    return Table(
        tuple(files),
        frozenset((*columns, "id")),
        total,
        digest((os.path.basename(file), file_digest(file, whole=not file.endswith(".parquet"))) for file in files),
        image,
        video,
        None if numbered else id or ("id" if "id" in columns else None),
        folder,
        repeats,
    )


def is_id(value: Any) -> TypeGuard[str | int]:
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and not isinstance(value, bool))


def _images(value: Any, folder: str) -> tuple[Media, ...]:
    several = value if isinstance(value, list) else [value]
    return tuple(found for each in several if (found := _media(each, folder)) is not None)


def _media(value: Any, folder: str) -> Media | None:
    """One picture or video of a row; None for an empty value. Raises TypeError for another kind of value."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("bytes") or value.get("path")
    if value is None or value in ("", b""):
        return None
    if isinstance(value, bytes) or (isinstance(value, str) and value.startswith(("data:", "http://", "https://"))):
        return value
    if isinstance(value, str):
        return os.path.join(folder, value)
    raise TypeError(f"a picture or video is a path, a data URI or bytes, not {str(value)[:80]!r}")
