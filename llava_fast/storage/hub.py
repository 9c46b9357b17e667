"""Resolves a path or a Hub id to a local directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.storage.files import one_line

_UNUSED_FILES = ["*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def resolve(path_or_hub_id: str | Path, only: list[str] | None = None, revision: str | None = None) -> Path:
    """The local directory of that name, else that of a Hub repository in the cache, downloaded if necessary
    (HF_HUB_OFFLINE is respected). only: patterns of the files to download; default all. revision: the
    repository's; default main.

    Raises CheckpointError for a file, and for a name that is neither a directory nor available from the Hub.
    """
    if (path := local_directory(path_or_hub_id)) is not None:
        return path
    if os.path.exists(os.path.expanduser(path_or_hub_id)):
        raise CheckpointError(f"{path_or_hub_id} is a file; give the directory that holds config.json")
    from huggingface_hub import snapshot_download  # imported late: not needed for a local directory

    try:
        wanted: dict[str, Any] = {"allow_patterns": only, "ignore_patterns": _UNUSED_FILES, "revision": revision}
        return Path(snapshot_download(str(path_or_hub_id), **wanted))
    except Exception as problem:  # no such repository, no network, not allowed, no valid id
        raise CheckpointError(
            f"{path_or_hub_id!r} is neither a local directory nor an accessible Hub repository ({one_line(problem)})"
        ) from problem


def local_directory(name: str | Path) -> Path | None:
    """The local directory of that name, if it exists; "~" is the home directory. `name` may be any text."""
    path = os.path.expanduser(name)  # unlike pathlib, os.path accepts names that are too long or invalid
    return Path(path) if os.path.isdir(path) else None
