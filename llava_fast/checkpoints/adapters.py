"""Directories that hold only a part of a model: a trained projector, or LoRA factors with what else was trained.

Both need the base they were trained on. LoRA is merged as it is read: W + scale * B @ A, computed in float32 and
rounded once to the base's dtype. `save_adapter` and `save_projector` write such directories: beside an original base as
the original's trainer does, beside a Hugging Face one as PEFT does.

Sources: haotian-liu/LLaVA c121f04 model/builder.py (which files, which prefixes) and train/train.py (what they
hold); Hu et al. 2021 (LoRA); huggingface/peft's adapter_config.json fields, and what its modules_to_save are stored as.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava_fast.checkpoints.config import read_json
from llava_fast.checkpoints.hub import resolve
from llava_fast.checkpoints.names import NameLayout, from_stored, to_stored
from llava_fast.checkpoints.save import NOTE_FILE, write_json, written_whole
from llava_fast.checkpoints.tensor_files import StoredTensor, name_tensors, open_file
from llava_fast.errors import CheckpointError
from llava_fast.models.config import LlavaConfig

ADAPTER_CONFIG = "adapter_config.json"
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_EXTRA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}


def find_projector_file(path: Path) -> Path | None:
    """The file of a directory that holds only a trained projector, if there is one."""
    return _first_existing(path, _PROJECTOR_FILES)


def add_projector(base: Mapping[str, StoredTensor], file: Path) -> dict[str, StoredTensor]:
    """Our names -> tensors, those of a projector-only file over those of the language model."""
    return {**base, **name_tensors(open_file(file), _from_wrapped)}


def add_lora(base: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """Our names -> tensors, with an adapter directory's LoRA merged and its other trained tensors put in place: those
    of the original's own file, and the modules that PEFT saves whole.

    Raises CheckpointError for an adapter that is not plain LoRA on Linear weights of this base.
    """
    scale = _scale(path)
    file = _first_existing(path, _ADAPTER_FILES)
    if file is None:
        raise CheckpointError(f"{path} holds {ADAPTER_CONFIG} but neither {' nor '.join(_ADAPTER_FILES)}")
    tensors = dict(base)
    if extra := _first_existing(path, _EXTRA_FILES):
        tensors.update(name_tensors(open_file(extra), _from_wrapped))
    pairs, whole = _split(open_file(file), base, file)
    tensors.update(whole)
    for name, (a, b) in pairs.items():
        weight = tensors.get(name)
        if weight is None or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            found = "no such tensor" if weight is None else f"shape {list(weight.shape)}"
            raise CheckpointError(
                f"{file}: LoRA of {name} is {list(b.shape)} x {list(a.shape)} and the base has {found}; "
                "give the base model it was trained on as model_base"
            )
        merge = functools.partial(_merge, weight, a, b, scale)
        tensors[name] = StoredTensor(weight.file, weight.key, weight.shape, weight.dtype, merge)
    return tensors


def check_adapter(path_or_hub_id: str | Path) -> None:
    """Raises CheckpointError for what is no adapter directory."""
    path = resolve(path_or_hub_id)
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{path} holds no {ADAPTER_CONFIG}, so there is no adapter to merge")


def save_adapter(
    path: Path,
    settings: Mapping[str, Any],
    factors: Mapping[str, torch.Tensor],
    others: Mapping[str, torch.Tensor],
    config: LlavaConfig,
    note: str | None = None,
) -> None:
    """Write an adapter directory, in place of what is there. `add_lora` reads it, and so do PEFT on the base in
    transformers and, for an original LLaVA, the original's loader.

    settings  adapter_config.json, PEFT's fields. What its modules_to_save name goes with the factors.
    factors   LoRA factors by our names: decoder.layers.0.self_attn.q_proj.lora_A.weight.
    others    what else was trained, by our names.
    config    the model's. An original LLaVA's goes with the adapter, whose base may be a bare language model.
    note      what NOTE_FILE says.
    """
    stored = {name: _PEFT_PREFIX + _beside(config, name) for name in (*factors, *others)}
    saved = tuple(f"{_PEFT_PREFIX}model.{module}." for module in settings.get("modules_to_save") or ())
    held = {**factors, **{name: value for name, value in others.items() if stored[name].startswith(saved)}}
    rest = {stored[name]: value for name, value in others.items() if name not in held}
    with written_whole(path) as directory:
        write_json(directory / ADAPTER_CONFIG, dict(settings))
        file = directory / _ADAPTER_FILES[0]
        save_file({stored[name]: each.contiguous() for name, each in held.items()}, file, metadata={"format": "pt"})
        file.chmod((directory / ADAPTER_CONFIG).stat().st_mode)  # safetensors' files are their owner's alone
        if rest:
            torch.save(rest, directory / _EXTRA_FILES[1])
        _describe(directory, config, note)


def save_projector(path: Path, tensors: Mapping[str, torch.Tensor], config: LlavaConfig, note: str | None) -> None:
    """Write a directory with a trained projector (and newline row) alone, in place of what is there: mm_projector.bin
    in the original's names, as its first stage leaves it, which its second stage, its loader and ours read.

    tensors  by our names. config, note: as for `save_adapter`; without the config of an original LLaVA the directory
             is no checkpoint, and serves as `projector_from`.
    """
    kind = config.projector.kind
    with written_whole(path) as directory:
        stored = {to_stored(name, "original", kind): value.contiguous() for name, value in tensors.items()}
        torch.save(stored, directory / _PROJECTOR_FILES[1])
        _describe(directory, config, note)


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W [out, in] + scale * B [out, rank] @ A [rank, in], computed in float32, in W's dtype."""
    return (b.float() @ a.float()).mul_(scale).add_(weight).to(weight.dtype)


def _beside(config: LlavaConfig, name: str) -> str:
    """What PEFT calls our tensor `name`: transformers 5's name of it, or the original's."""
    names: NameLayout = "hf5" if config.layout == "hf" else "original"
    return to_stored(name, names, config.projector.kind)


def _describe(directory: Path, config: LlavaConfig, note: str | None) -> None:
    if config.layout == "original":
        write_json(directory / "config.json", config.source)
    if note is not None:
        (directory / NOTE_FILE).write_text(note, encoding="utf-8")


def _merge(weight: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float) -> torch.Tensor:
    return merge(weight.load(), a.load(), b.load(), scale)


def _scale(path: Path) -> float:
    adapter = read_json(path / ADAPTER_CONFIG)
    if adapter.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path / ADAPTER_CONFIG}: peft_type is {adapter['peft_type']!r}; supported: LORA")
    for field, plain in _UNSUPPORTED.items():
        if adapter.get(field, plain) not in (plain, None):
            raise CheckpointError(
                f"{path / ADAPTER_CONFIG}: {field} {adapter[field]!r} is not supported; merge the adapter with peft"
            )
    rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
    if not rank or alpha is None:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} states no r and lora_alpha, so LoRA cannot be scaled")
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


def _split(
    stored: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], file: Path
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
    """(our weight name -> (A, B), our name -> what takes a tensor's place in the base)."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    whole = {}
    for key, tensor in stored.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", _bare(key))
        name = from_stored(f"{match[1]}.weight" if match else _bare(key))
        if name is None or not match and name not in base:
            raise CheckpointError(f"{file} holds {key!r}, which is no LoRA factor of a Linear in a LLaVA model")
        if match:
            halves.setdefault(name, {})[match[2]] = tensor
        else:
            whole[name] = tensor
    for name, pair in halves.items():
        if len(pair) == 1:
            raise CheckpointError(f"{file} holds lora_{next(iter(pair))} of {name} without its other half")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, whole


def _from_wrapped(key: str) -> str | None:
    return from_stored(_bare(key))


def _bare(key: str) -> str:
    """A stored name without the wrappers of peft (base_model.model.) and of DeepSpeed (module.)."""
    return key.removeprefix("module.").removeprefix(_PEFT_PREFIX)


def _first_existing(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).exists()), None)
