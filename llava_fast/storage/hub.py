"""From a path or a Hub id to a local directory."""

from __future__ import annotations

import os
from pathlib import Path

from llava_fast.errors import CheckpointError
from llava_fast.storage.files import one_line

_UNUSED_FILES = ["*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def resolve(path_or_hub_id: str | Path, only: list[str] | None = None) -> Path:
    """A local directory as it is, else a Hub id from the cache or downloaded (HF_HUB_OFFLINE is obeyed): all of it, or
    `only` the files that match these patterns.

    Raises CheckpointError for a file, and for what is neither here nor to be had from the Hub.
    """
    if (path := local_directory(path_or_hub_id)) is not None:
        return path
    if os.path.exists(os.path.expanduser(path_or_hub_id)):
        raise CheckpointError(f"{path_or_hub_id} is a file; give the directory that holds config.json")
    from huggingface_hub import snapshot_download  # not needed for a local directory

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=only, ignore_patterns=_UNUSED_FILES))
    except Exception as problem:  # no such repository, no network, not allowed, no valid id
        raise CheckpointError(
            f"{path_or_hub_id!r} is neither a directory here nor a repository the Hub gives us ({one_line(problem)})"
        ) from problem


def local_directory(name: str | Path) -> Path | None:
    """The directory of that name here, if there is one; "~" is the home directory. A name may be any text."""
    path = os.path.expanduser(name)  # unlike pathlib's, these two take a name that is too long or no name at all
    return Path(path) if os.path.isdir(path) else None
