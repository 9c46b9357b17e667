"""A folder of pictures or videos as a batch's input."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from llava_fast.batch.digest import digest
from llava_fast.batch.items import IMAGES, VIDEOS, Item
from llava_fast.errors import BatchError


@dataclass(frozen=True)
class Folder:
    """Pictures and videos below a folder, sorted by path; see items.Source. The id is the path within the folder."""

    path: str
    names: tuple[str, ...]
    digest: str
    remark: str
    columns: frozenset[str] | None = frozenset(("id", "name"))
    repeats: bool = False

    @property
    def total(self) -> int:
        return len(self.names)

    @property
    def has_videos(self) -> bool:
        return any(_suffix(name) in VIDEOS for name in self.names)

    def items(self, first: int = 0) -> Iterator[Item]:
        for number in range(first, len(self.names)):
            name = self.names[number]
            columns = {"id": name, "name": name.rpartition("/")[2]}
            file = os.path.join(self.path, name)
            if _suffix(name) in VIDEOS:
                yield Item(number, name, columns, video=file)
            else:
                yield Item(number, name, columns, (file,))


def open_folder(path: str) -> Folder:
    """The pictures and videos below `path`, hidden ones left out; links to folders are not followed. Raises BatchError
    for a folder that holds none or cannot be listed."""

    def refuse(error: OSError) -> None:
        raise BatchError(f"the folder {error.filename} cannot be listed: {error.strerror}") from None

    names, others = [], Counter[str]()
    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        for name in files:
            if name.startswith("."):
                continue
            if _suffix(name) in (*IMAGES, *VIDEOS):
                names.append(name if inside == "." else f"{inside}/{name}")
            else:
                others[_suffix(name) or "no suffix"] += 1
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    if not names:
        what = f"only other files ({found})" if found else "no files"
        raise BatchError(
            f"the folder {path} holds {what}: a batch reads pictures ({' '.join(IMAGES)}) and videos "
            f"({' '.join(VIDEOS)}); name a table or shards by themselves ('{path}/*.tar')"
        )
    names.sort()
    remark = f"left out as neither pictures nor videos: {found}" if found else ""
    return Folder(path, tuple(names), digest((name, _size(os.path.join(path, name))) for name in names), remark)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nothing: its row will say so
        return -1
