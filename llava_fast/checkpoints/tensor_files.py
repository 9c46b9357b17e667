"""The tensors of a checkpoint directory, by stored name, read one at a time through a memory map.

Only headers are read until a tensor is asked for. A safetensors file is mapped once per tensor, so one that
is converted gives its pages back at once, and one that is kept is a view of the file rather than a copy.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llava_fast.checkpoints.config import read_json
from llava_fast.checkpoints.names import from_stored, is_skipped
from llava_fast.errors import CheckpointError

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
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor in a file: what it is, without its data. `held` is set for .bin shards (a mapped tensor)."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    held: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype, backed by the file."""
        if self.held is not None:
            return self.held
        with safe_open(self.file, framework="pt", device="cpu") as opened:
            return opened.get_tensor(self.key)


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by stored name: one file or shards with an index, safetensors before .bin.

    Raises CheckpointError for a directory without weights and for a shard that is missing or unreadable.
    """
    for name in _WEIGHT_FILES:
        if (path / f"{name}.index.json").exists():
            return _open_shards(path, f"{name}.index.json")
        if (path / name).exists():
            return open_file(path / name)
    raise CheckpointError(f"{path} holds no weights: it needs {' or '.join(_WEIGHT_FILES)}, or an index.json")


def open_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one .safetensors file, or of one .bin file holding a plain dict of tensors."""
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)


def name_tensors(
    stored: Mapping[str, StoredTensor], rename: Callable[[str], str | None] = from_stored
) -> dict[str, StoredTensor]:
    """Stored tensors under our names, without those that no LLaVA needs (see names.is_skipped).

    Raises CheckpointError for a name no LLaVA has and for a quantised tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        if is_skipped(key):
            continue
        name = rename(key)
        if name is None:
            raise CheckpointError(f"{tensor.file} holds {key!r}, which no supported LLaVA model has")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{tensor.file}: {key!r} is {tensor.dtype}; load an unquantised checkpoint")
        tensors[name] = tensor
    return tensors


def has_weights(path: Path) -> bool:
    """Whether a directory holds model weights, in one file or in shards."""
    return any((path / f"{name}{suffix}").exists() for name in _WEIGHT_FILES for suffix in ("", ".index.json"))


def _open_shards(path: Path, index: str) -> dict[str, StoredTensor]:
    placed: Mapping[str, str] = read_json(path / index).get("weight_map", {})
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        if not (path / shard).exists():
            count = sum(home == shard for home in placed.values())
            raise CheckpointError(
                f"{path} lacks the shard {shard}, which {index} says holds {count} tensors; download it again"
            )
        tensors.update(open_file(path / shard))
    if lost := [name for name in placed if name not in tensors]:
        raise CheckpointError(f"{path / placed[lost[0]]} lacks {lost[0]!r}, which {index} places there")
    return tensors


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    return {key: StoredTensor(file, key, shape, dtype) for key, shape, dtype in _safetensors_header(file)}


def _safetensors_header(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of each tensor, from the header alone (format: huggingface/safetensors README)."""
    try:
        with safe_open(file, framework="pt"):  # the library's own validation: offsets, lengths, overlaps
            pass
        with open(file, "rb") as raw:
            header = json.loads(raw.read(struct.unpack("<Q", raw.read(8))[0]))
    except (SafetensorError, OSError, ValueError) as problem:
        raise CheckpointError(
            f"{file} is no readable safetensors file ({problem}); it may be cut short or a Git LFS pointer: "
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
        raise CheckpointError(f"{file} cannot be read by torch.load ({problem}); download it again") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is not a plain dict of tensors, so it holds no model weights")
    return {key: StoredTensor(file, key, tuple(t.shape), t.dtype, held=t) for key, t in content.items()}
