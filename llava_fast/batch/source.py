"""A batch's input by its name: a folder, a table, shards, or several of one kind by a glob."""

from __future__ import annotations

import glob
import os

from llava_fast.batch import readers, shards
from llava_fast.batch.folder import kinds, list_folder, open_folder
from llava_fast.batch.items import Source, check_pyav, is_media
from llava_fast.batch.tables import open_table
from llava_fast.errors import BatchError


def open_source(
    name: str,
    image_column: str | None = None,
    video_column: str | None = None,
    id_column: str | None = None,
    image_folder: str | None = None,
) -> Source:
    """The input called `name`; the columns are those of a table (see tables.Table). Raises BatchError for an input that
    is not there, cannot be read or has no rows."""
    if os.path.isdir(name):
        path = os.path.abspath(name)  # for workers with another working directory
        listed = list_folder(path)
        archives = [each for each in listed if each.lower().endswith(shards.SUFFIXES)]
        if archives and not any(map(is_media, listed)):
            _check_no_columns(image_column, video_column, image_folder)
            others = kinds(each for each in listed if not each.lower().endswith(shards.SUFFIXES))
            remark = f"left out as no shards: {others}" if others else ""
            return shards.open_shards([os.path.join(path, each) for each in archives], id_column, remark)
        if named := [option for option in (image_column, video_column, id_column, image_folder) if option is not None]:
            raise BatchError(f"the folder {name} has no columns: leave {named[0]!r} and its option out")
        folder = open_folder(path, listed)
        if folder.has_videos:
            check_pyav()
        return folder
    files = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    files = [os.path.abspath(file) for file in files]
    if not files:
        raise BatchError(f"there is no input {name} (looked from {os.getcwd()}): check the path")
    suffixes = {_suffix(file) for file in files}
    if "" in suffixes:
        known = " ".join((*readers.SUFFIXES, *shards.SUFFIXES))
        odd = next(file for file in files if not _suffix(file))
        raise BatchError(f"{odd} is of no kind that a batch reads: a folder, or a file called {known}")
    if suffixes <= set(shards.SUFFIXES):
        _check_no_columns(image_column, video_column, image_folder)
        return shards.open_shards(files, id_column)
    if len(suffixes) > 1:
        raise BatchError(f"{name} stands for files of several kinds ({' '.join(sorted(suffixes))}): name one kind")
    if image_folder is not None and not os.path.isdir(image_folder):
        raise BatchError(f"there is no folder {image_folder} of --image-folder")
    folder_of_paths = None if image_folder is None else os.path.abspath(image_folder)
    table = open_table(files, image_column, video_column, id_column, folder_of_paths)
    if table.video is not None:
        check_pyav()
    return table


def _suffix(file: str) -> str:
    known = (suffix for suffix in (*readers.SUFFIXES, *shards.SUFFIXES) if file.lower().endswith(suffix))
    return next(known, "")


def _check_no_columns(*given: str | None) -> None:
    if any(given):
        raise BatchError("--image-column, --video-column and --image-folder are for tables: shards hold pictures")
