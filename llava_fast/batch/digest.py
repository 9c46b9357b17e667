"""Digests that tell whether a file or a model has changed, of a bounded number of bytes of each file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

SAMPLES, SAMPLE = 64, 1 << 16
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")


def digest(parts: Iterable[Any]) -> str:
    """Of values, by what they print as."""
    made = blake2b(digest_size=12)
    for part in parts:
        made.update(repr(part).encode(errors="surrogateescape") + b"\n")
    return made.hexdigest()


def file_digest(path: str | Path, whole: bool = False) -> str:
    """Of a file's size and content: all of it, or, unless `whole`, of a file above 4 MB, 64 samples of 64 KB spread
    over it. Raises OSError."""
    made = blake2b(digest_size=12)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        made.update(str(size).encode())
        if whole or size <= SAMPLES * SAMPLE:
            while block := file.read(1 << 20):
                made.update(block)
        else:
            for number in range(SAMPLES):
                file.seek(number * (size - SAMPLE) // (SAMPLES - 1))
                made.update(file.read(SAMPLE))
    return made.hexdigest()


def model_digest(folder: Path) -> str:
    """Of the files of a checkpoint that decide its answers. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES and path.is_file())
    return digest((path.relative_to(folder).as_posix(), file_digest(path)) for path in files)
