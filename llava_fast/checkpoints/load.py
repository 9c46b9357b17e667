"""Loading a checkpoint: find it, read its config, and fill a model that was built on the meta device.

    checkpoint = load_checkpoint("llava-hf/llava-1.5-7b-hf")
    with torch.device("meta"):
        model = LlavaModel(checkpoint.config)
    load_weights(model, checkpoint, device="cpu")

Nothing is allocated twice: parameters are assigned, one tensor at a time, and where neither dtype nor device
changes they stay views of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llava_fast.checkpoints.config import read_hf_config, read_json
from llava_fast.checkpoints.names import from_stored, is_skipped
from llava_fast.checkpoints.tensor_files import WEIGHT_DTYPES, StoredTensor, open_weights
from llava_fast.errors import CheckpointError
from llava_fast.models.config import LlavaConfig

_UNUSED_FILES = ["*.gguf", "*.onnx", "*.msgpack", "*.h5"]


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint that has been found and understood, its weights still on disk.

    path      directory of config.json, tokenizer and processor files.
    config    what the model is.
    tensors   our name -> where it is stored.
    dtype     what parameters become: the one asked for, else that of the stored token embedding (checkpoints
              mix: a CLIP tower from its own repository is float32 beside a float16 decoder).
    device    where they go.
    """

    path: Path
    config: LlavaConfig
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype
    device: torch.device


def load_checkpoint(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedCheckpoint:
    """Find a checkpoint (a directory, or a Hub id, taken from the cache or downloaded) and read its config.

    Raises CheckpointError for a directory that is no LLaVA, an unsupported model, or a missing shard.
    """
    path = resolve(path_or_hub_id)
    read_json(path / "config.json")
    config = read_hf_config(path)
    tensors = name_tensors(open_weights(path), config)
    return LoadedCheckpoint(path, config, tensors, dtype or stored_dtype(tensors, path), torch.device(device))


def load_weights(
    model: nn.Module,
    checkpoint: LoadedCheckpoint,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Assign every parameter of `model` (built on the meta device or not) from the checkpoint.

    `device` and `dtype` default to the checkpoint's. Names and shapes are checked before anything is read:
    CheckpointError lists tensors that are missing, unexpected or of another shape, and nothing is assigned.
    """
    device = torch.device(device) if device is not None else checkpoint.device
    dtype = dtype or checkpoint.dtype
    parameters = dict(model.named_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_tensors(expected, checkpoint.tensors, checkpoint.path)
    for name, parameter in parameters.items():
        value = checkpoint.tensors[name].read().to(device=device, dtype=dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], path: Path
) -> None:
    """Raise one CheckpointError if the stored tensors are not exactly the expected ones, names and shapes."""
    if missing := sorted(expected.keys() - stored.keys()):
        raise CheckpointError(
            f"{path} lacks {_listed(missing)}; its download is incomplete or its config.json another model's"
        )
    if extra := sorted(stored.keys() - expected.keys()):
        raise CheckpointError(
            f"{path} holds {_listed(stored[name].key for name in extra)} with no place in the model that "
            "config.json describes; check its layer counts, biases and tie_word_embeddings"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name].file}: {stored[name].key!r} has shape {list(stored[name].shape)} and "
                f"config.json asks for {list(shape)}; the two files belong to different models"
            )


def name_tensors(stored: Mapping[str, StoredTensor], config: LlavaConfig) -> dict[str, StoredTensor]:
    """Stored tensors under our names. Raises CheckpointError for a name no LLaVA has."""
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        if is_skipped(key):
            continue
        name = from_stored(key)
        if name is None:
            raise CheckpointError(f"{tensor.file} holds {key!r}, which no supported LLaVA model has")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{tensor.file}: {key!r} is {tensor.dtype}; load an unquantised checkpoint")
        tensors[name] = tensor
    if config.decoder.tie_embeddings and (head := tensors.pop("decoder.lm_head.weight", None)) is not None:
        _check_tied(head, tensors.get("decoder.embed_tokens.weight"))
    return tensors


def stored_dtype(tensors: Mapping[str, StoredTensor], path: Path) -> torch.dtype:
    """The dtype of the stored token embedding, which stands for the checkpoint's."""
    if "decoder.embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{path} holds no token embedding: its weights are not those of a LLaVA model")
    return tensors["decoder.embed_tokens.weight"].dtype


def resolve(path_or_hub_id: str | Path) -> Path:
    """A local directory as it is, else a Hub id from the cache or downloaded (HF_HUB_OFFLINE is obeyed)."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json")
    from huggingface_hub import snapshot_download  # not needed for a local directory

    try:
        return Path(snapshot_download(str(path_or_hub_id), ignore_patterns=_UNUSED_FILES))
    except Exception as problem:  # no such repository, no network, not allowed, no valid id
        raise CheckpointError(
            f"{path_or_hub_id!r} is neither a directory here nor a repository the Hub gives us ({problem})"
        ) from problem


def _check_tied(head: StoredTensor, embedding: StoredTensor | None) -> None:
    """A tied checkpoint may store the head as well; it must then be the embedding."""
    if embedding is not None and not torch.equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{head.file}: {head.key!r} differs from the token embedding though config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:most])}{more}"
