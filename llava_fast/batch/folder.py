"""A folder of pictures or videos as a batch's input."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llava_fast.batch.digest import digest
from llava_fast.batch.items import IMAGES, VIDEOS, Item, is_media
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
    def files(self) -> tuple[str, ...]:
        return tuple(os.path.join(self.path, name) for name in self.names)

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


def list_folder(path: str) -> list[str]:
    """The files below `path`, sorted, by their path within it; hidden ones are left out, and links to folders are not
    followed. Raises BatchError for a folder that cannot be listed."""

    def refuse(error: OSError) -> None:
        raise BatchError(f"the folder {error.filename} cannot be listed: {error.strerror}") from None

    names = []
    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        names += [name if inside == "." else f"{inside}/{name}" for name in files if not name.startswith(".")]
    return sorted(names)


def open_folder(path: str, listed: list[str]) -> Folder:
    """The pictures and videos among the files of `list_folder(path)`. Raises BatchError where there are none."""
    names = [name for name in listed if is_media(name)]
    left_out = kinds(name for name in listed if not is_media(name))
    if not names:
        what = f"only other files ({left_out})" if left_out else "no files"
        raise BatchError(
            f"the folder {path} holds {what}: a batch reads pictures ({' '.join(IMAGES)}), videos "
            f"({' '.join(VIDEOS)}) and shards of a folder; name tables by themselves ('{path}/*.csv')"
        )
    remark = f"left out as neither pictures nor videos: {left_out}" if left_out else ""
    return Folder(path, tuple(names), digest((name, _size(os.path.join(path, name))) for name in names), remark)


def kinds(names: Iterable[str]) -> str:
    """How many files have each of the most common suffixes ("": there are no files)."""
    counts = Counter(_suffix(name) or "no suffix" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nothing: its row will say so
        return -1
