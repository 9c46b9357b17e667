"""The tensors of a checkpoint directory by stored name, read one at a time through a memory map.

Only headers are read until a tensor is loaded. A tensor whose dtype and device stay the same is a view of its file, not
a copy.
"""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from llava_fast.errors import CheckpointError
from llava_fast.storage.files import Fields, check_regular, one_line, read_json

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Index(Fields):
    """model.safetensors.index.json: the tensors' names and their files."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor in a file: its metadata, and `load`, which reads it to the CPU in its stored dtype."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, file: Path, key: str, tensor: torch.Tensor) -> StoredTensor:
        """A StoredTensor of a tensor that is already in memory."""
        return cls(file, key, tuple(tensor.shape), tensor.dtype, functools.partial(_itself, tensor))


class _SafetensorsFile:
    """A memory-mapped file that is mapped again after every 4 MiB read. A mapping is released unless a tensor that is a
    view of it is kept, so that pages of converted or copied tensors do not accumulate to the size of the file."""

    remap_after = 4 * 2**20

    def __init__(self, file: Path) -> None:
        self.file = file
        self.read_bytes = self.remap_after

    def load(self, key: str, nbytes: int) -> torch.Tensor:
        if self.read_bytes >= self.remap_after:
            self.mapped = safe_open(self.file, framework="pt", device="cpu")
            self.read_bytes = 0
        self.read_bytes += nbytes
        return self.mapped.get_tensor(key)


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by stored name, from one file or from shards with an index; safetensors is preferred
    to .bin. A single file is preferred to an index, which may be left over from shards that it replaced.

    Raises CheckpointError for a directory without weights and for a missing or unreadable shard.
    """
    for name in _WEIGHT_FILES:
        if (path / name).exists():
            return open_file(path / name)
        if (path / f"{name}.index.json").exists():
            return _open_shards(path, f"{name}.index.json")
    raise CheckpointError(f"{path} has no weights: it needs {' or '.join(_WEIGHT_FILES)}, or an index.json")


def open_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one .safetensors file, or of one .bin file holding a plain dict of tensors."""
    check_regular(file)
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)


def has_weights(path: Path) -> bool:
    """Whether a directory holds model weights, in one file or in shards."""
    return any((path / f"{name}{suffix}").exists() for name in _WEIGHT_FILES for suffix in ("", ".index.json"))


def _open_shards(path: Path, index: str) -> dict[str, StoredTensor]:
    placed: Mapping[str, str] = read_json(path / index, Index).get("weight_map", {})
    if not placed:
        raise CheckpointError(f"{path / index} has no weight_map; download it again")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        if PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor or ".." in PureWindowsPath(shard).parts:
            raise CheckpointError(f"{path / index}: weight_map names {shard!r}, which is outside {path}")
        if not os.path.lexists(path / shard):
            count = sum(home == shard for home in placed.values())
            raise CheckpointError(
                f"{path} lacks the shard {shard}, which has {count} tensors according to {index}; download it again"
            )
        try:
            tensors.update(open_file(path / shard))
        except CheckpointError as problem:
            raise CheckpointError(f"{path / index} names {shard!r}: {problem}") from None
    if lost := [name for name in placed if name not in tensors]:
        raise CheckpointError(f"{path / placed[lost[0]]} lacks {lost[0]!r}, which {index} places there")
    return tensors


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    mapped = _SafetensorsFile(file)
    tensors = {}
    for key, shape, dtype in _safetensors_header(file):
        load = functools.partial(mapped.load, key, math.prod(shape) * dtype.itemsize)
        tensors[key] = StoredTensor(file, key, shape, dtype, load)
    return tensors


def _safetensors_header(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of each tensor, from the header alone (format: huggingface/safetensors README)."""
    try:
        with safe_open(file, framework="pt"):  # the library's own validation: offsets, lengths, overlaps
            pass
        with open(file, "rb") as raw:
            header = json.loads(raw.read(struct.unpack("<Q", raw.read(8))[0]))
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({problem}); it may be truncated or a Git LFS pointer: "
            "download it again"
        ) from None
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file}: {key!r} has dtype {entry['dtype']}, which no LLaVA weight has")
        yield key, tuple(entry["shape"]), _DTYPES[entry["dtype"]]


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as problem:
            if "mmap can only be used" not in str(problem):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except Exception as problem:  # unpickling damaged bytes can raise nearly anything
        raise CheckpointError(f"{file} cannot be read by torch.load ({one_line(problem)}); download it again") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # LAVIS' files
    if not isinstance(content, dict) or not all(map(_is_plain, content, content.values())):
        raise CheckpointError(f"{file} is not a plain dict of tensors, so it holds no model weights")
    return {key: StoredTensor.of(file, key, tensor) for key, tensor in content.items()}


def _is_plain(key: Any, value: Any) -> bool:
    """Whether an entry is a name and a dense tensor with values (not sparse, not on the meta device)."""
    return isinstance(key, str) and isinstance(value, torch.Tensor) and value.is_cpu and value.layout is torch.strided


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
