"""From a path or a Hub id to a local directory."""

from __future__ import annotations

from pathlib import Path

from llava_fast.errors import CheckpointError

_UNUSED_FILES = ["*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def resolve(path_or_hub_id: str | Path, only: list[str] | None = None) -> Path:
    """A local directory as it is, else a Hub id from the cache or downloaded (HF_HUB_OFFLINE is obeyed): all of it, or
    `only` the files that match these patterns.

    Raises CheckpointError for a file, and for what is neither here nor to be had from the Hub.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json")
    from huggingface_hub import snapshot_download  # not needed for a local directory

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=only, ignore_patterns=_UNUSED_FILES))
    except Exception as problem:  # no such repository, no network, not allowed, no valid id
        raise CheckpointError(
            f"{path_or_hub_id!r} is neither a directory here nor a repository the Hub gives us ({problem})"
        ) from problem
