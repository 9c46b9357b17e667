"""WebDataset's tar shards as a batch's input: files of one name, up to the first dot, are one sample."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_fast.batch.digest import digest, file_digest
from llava_fast.batch.items import IMAGES, VIDEOS, Item, is_media
from llava_fast.batch.output import GO_ON
from llava_fast.errors import BatchError
from llava_fast.storage.files import one_line

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MOST_TEXT = 1 << 20  # bytes of a member that is a column
MOST_SAMPLE = 512 << 20  # bytes of a sample's members that are read
DAMAGE = (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile)
"""Errors of an archive's content; another OSError is of the disk or the network, and may be gone at the next run."""

Sample = dict[str, bytes | None]
"""Members by their suffixes, lower case; None: too large to be read, or not wanted."""


@dataclass(frozen=True)
class Shards:
    """Samples of tar files in order; see items.Source. The id is SHARD/KEY, or the value of `id_column`. Columns are
    the fields of a sample's .json, and its other small text files by their suffix (`txt`)."""

    files: tuple[str, ...]
    id_column: str | None
    digest: str
    columns: frozenset[str] | None = None
    total: int | None = None
    repeats: bool = False
    remark: str = ""

    def items(self, first: int = 0) -> Iterator[Item]:
        number = 0
        for file in self.files:
            shard = _stem(file)
            try:
                with tarfile.open(file, "r:*") as tar:
                    for key, members in _samples(tar, first - number):
                        if number >= first:
                            yield self._item(number, f"{shard}/{key}", members)
                        number += 1
            except DAMAGE as error:
                if number >= first:  # the rest of the shard
                    yield Item(number, shard, error=f"{file} cannot be read on: {one_line(error)}")
                number += 1
            except OSError as error:
                raise BatchError(
                    f"{file} cannot be read ({error.strerror or error}): mend that, then {GO_ON}"
                ) from None

    def _item(self, number: int, name: str | int, members: Sample) -> Item:
        columns: dict[str, Any] = {}
        image = video = None
        for suffix, data in members.items():
            kind = f".{suffix.rpartition('.')[2]}"
            if is_media(kind) and data is None:
                most = MOST_SAMPLE >> 20
                return Item(number, name, error=f"the sample's {suffix} is too large: a sample may have {most} MB")
            if kind in IMAGES:
                image = image or data
            elif kind in VIDEOS:
                video = video or data
            elif data is not None:
                columns |= _columns(suffix, data)
        if self.id_column is not None:
            found = columns.get(self.id_column)
            if not isinstance(found, (str, int)) or found == "":
                return Item(number, name, error=f"the sample has no {self.id_column!r}")
            name = found
        columns.setdefault("id", name)
        if image is None and video is None:
            held = ", ".join(members)
            return Item(number, name, columns, error=f"the sample holds no picture and no video ({held})")
        return Item(number, name, columns, () if image is None else (image,), video)


def open_shards(files: list[str], id_column: str | None, remark: str = "") -> Shards:
    """Raises BatchError for a file that is no tar archive, and for shards of one name."""
    digests = []
    stems: dict[str, str] = {}
    for file in files:
        if (other := stems.setdefault(_stem(file), file)) != file:
            raise BatchError(f"{other} and {file} have one name, which is part of the ids: rename one of them")
        try:
            with tarfile.open(file, "r:*"):
                pass
            digests.append((os.path.basename(file), file_digest(file)))
        except (*DAMAGE, OSError) as error:
            raise BatchError(f"{file} is no tar archive that can be read ({one_line(error)})") from None
    return Shards(tuple(files), id_column, digest(digests), remark=remark)


def _stem(file: str) -> str:
    name = os.path.basename(file)
    return next((name[: -len(suffix)] for suffix in (".tar.gz", ".tgz", ".tar") if name.lower().endswith(suffix)), name)


def _samples(tar: tarfile.TarFile, skipped: int) -> Iterator[tuple[str, Sample]]:
    """Key and members of each sample; nothing is read of the first `skipped`. Members are read as they come, because to
    go back in a compressed archive is to read it again. Raises errors of
    DAMAGE after what was whole before, and OSError."""
    number, key, members, held = 0, "", Sample(), 0
    failure = None
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # the archive would keep every header
            folder, _, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not (member.isfile() and stem and dot):
                continue
            this = f"{folder}/{stem}" if folder else stem
            if members and this != key:
                yield key, members
                number, members, held = number + 1, {}, 0
            key, suffix = this, suffix.lower()
            most = MOST_SAMPLE - held if is_media(f".{suffix}") else min(MOST_TEXT, MOST_SAMPLE - held)
            wanted = number >= skipped and member.size <= most
            held += member.size if wanted else 0
            members.setdefault(suffix, _bytes(tar, member, wanted))
        _check_end(tar)
    except DAMAGE as error:
        failure = error
    if members:
        yield key, members
    if failure is not None:
        raise failure


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, wanted: bool) -> bytes | None:
    """The bytes of a member; None unless `wanted`. Raises EOFError for one that is cut off, wanted or not, so that
    samples have one number whether or not they are read."""
    if wanted:
        file = tar.extractfile(member)
        assert file is not None  # a regular file
        data = file.read()
        if len(data) == member.size:
            return data
    else:
        assert tar.fileobj is not None
        tar.fileobj.seek(member.offset_data + max(member.size - 1, 0))
        if not member.size or tar.fileobj.read(1):
            return None
    raise EOFError(f"{member.name} is cut off")


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError where the archive ends in a header that is damaged, which tarfile takes for its end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a header is damaged")


def _columns(suffix: str, data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
        if suffix != "json":
            return {suffix: text.strip()}
        found = json.loads(text)
    except (ValueError, RecursionError):  # no text: no column
        return {}
    return found if isinstance(found, dict) else {}
