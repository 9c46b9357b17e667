"""Directories with only a part of a model: a trained projector, or an adapter with other trained parts.

Both need the base model they were trained on. Plain LoRA is merged while it is read: W + scale * B @ A, computed in
float32 and rounded once to the base's dtype. An adapter is plain only if each field of its adapter_config.json is unset
or known not to change that sum. Other adapters are merged by PEFT (peft_merge) or rejected by name. `save_adapter` and
`save_projector` write such directories: for an original base like the original's trainer, for a Hugging Face base like
PEFT.

Sources: haotian-liu/LLaVA c121f04 model/builder.py (file names, prefixes) and train/train.py (file contents); Hu et al.
2021 (LoRA); huggingface/peft 0.21 (fields of adapter_config.json, storage of modules_to_save, changes to the base while
an adapter is loaded: tuners/lora/layer.py).
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

from llava_fast.checkpoints.peft_merge import merge_with_peft
from llava_fast.checkpoints.save import NOTE_FILE
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config, fields
from llava_fast.families.base import Family
from llava_fast.families.names import HEAD, NameMap, Spelling
from llava_fast.models.config import LlavaConfig
from llava_fast.storage.files import read_json, write_json, written_whole
from llava_fast.storage.hub import resolve
from llava_fast.storage.tensor_files import StoredTensor, open_file

ADAPTER_CONFIG = "adapter_config.json"
_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_EXTRA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN_FIELDS = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save peft_type "
    "peft_version qalora_group_size r revision runtime_config target_modules task_type use_rslora".split()
)
"""Fields of adapter_config.json that are compatible with plain LoRA at any value: the merge reads them, or their effect
is visible in the adapter's tensor names and shapes, or in init_lora_weights."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that do not change the base."""
_UNMERGEABLE = {
    "alora_invocation_tokens": "acts only from its invocation tokens on, which no merged weight does",
    "arrow_config": "weighs several adapters at each token, which no merged weight does",
    "layer_replication": "repeats layers, so the result is a model of another config.json",
}
_UNSET: tuple[object, ...] = (None, False, "none", [], {})
_LOST_STARTS = {"corda": "data", "lora_ga": "gradients", "pissa_niter_": "random draws"}
"""Prefixes of init_lora_weights that change the base in ways the adapter does not store. PEFT cannot load the first on
the base, loses the change of the second and draws new random values for the third."""


def find_projector_file(path: Path) -> Path | None:
    """The projector file of a projector-only directory, or None."""
    return _first_existing(path, _PROJECTOR_FILES)


def add_projector(base: Mapping[str, StoredTensor], file: Path, family: Family) -> dict[str, StoredTensor]:
    """Our names -> tensors: those of the language model, overridden by those of a projector-only file and of the
    family's further ones beside it.
    """
    files = [file, *(more for name in family.beside_projector if (more := file.with_name(name)).is_file())]
    return {**base, **{name: each for one in files for name, each in _unwrapped(open_file(one), family.names).items()}}


def add_factors(tensors: Mapping[str, StoredTensor], alpha: float, rank: int) -> dict[str, StoredTensor]:
    """Our names -> tensors of a checkpoint with the low-rank weights that it holds beside its Linears' merged; alpha
    and rank are config.json's. Raises CheckpointError for a factor of another rank or that does not match its Linear.
    """
    pairs, merged = _paired(tensors)
    for name, (a, b) in pairs.items():
        _check_rank(name, a, rank, "config.json states")
        merged[name] = _merged(merged, name, a, b, alpha / rank, a.file)
    return merged


def add_adapter(
    base: Mapping[str, StoredTensor], path: Path, config: LlavaConfig, described: Path
) -> dict[str, StoredTensor]:
    """Our names -> tensors of the base with an adapter directory merged. Its other trained tensors replace those of the
    base: the original's non_lora_trainables, and PEFT's modules_to_save.

    base       the tensors of the base model, without a tied head.
    config     the base's config.
    described  directory of the base's config.json.

    If `config` ties the head and the adapter makes it differ from the embedding, the result contains the head too.
    Raises CheckpointError for an adapter that does not match this base or cannot be merged.
    """
    adapter = read_json(path / ADAPTER_CONFIG, fields.Adapter)
    file = _first_existing(path, _ADAPTER_FILES)
    if file is None:
        raise CheckpointError(f"{path} holds {ADAPTER_CONFIG} but neither {' nor '.join(_ADAPTER_FILES)}")
    tensors = dict(base)
    names = family_of_config(config).names
    if extra := _first_existing(path, _EXTRA_FILES):
        tensors.update(_unwrapped(open_file(extra), names))
    embedding = config.embedding
    tied = config.decoder.tie_embeddings and embedding in tensors
    stored, untied = open_file(file), tensors | ({HEAD: tensors[embedding]} if tied else {})
    if reason := _beyond_plain(adapter, path) or _beyond_linears(stored, untied, names):
        tensors = merge_with_peft(tensors, path, file, config, described, reason)
    else:
        tensors = _add_plain(untied, stored, adapter, file, names)
    if tied and HEAD in tensors and _same(tensors[HEAD], tensors[embedding]):
        del tensors[HEAD]
    return tensors


def _add_plain(
    base: Mapping[str, StoredTensor],
    stored: Mapping[str, StoredTensor],
    adapter: Mapping[str, Any],
    file: Path,
    names: NameMap,
) -> dict[str, StoredTensor]:
    """`base` with low-rank updates added, and with the tensors that the adapter stores whole."""
    tensors, rank, scale = dict(base), adapter.get("r"), _scale(adapter, file.parent)
    pairs, whole = _split(stored, file, names)
    tensors.update(whole)
    for name, (a, b) in pairs.items():
        _check_rank(name, a, rank, f"{ADAPTER_CONFIG} states r")
        tensors[name] = _merged(tensors, name, a, b, scale, file)
    return tensors


def _check_rank(name: str, a: StoredTensor, rank: int | None, states: str) -> None:
    if a.shape[0] != rank:
        raise CheckpointError(f"{a.file}: LoRA of {name} has rank {a.shape[0]} and {states} {rank}")


def _merged(
    tensors: Mapping[str, StoredTensor], name: str, a: StoredTensor, b: StoredTensor, scale: float, file: Path
) -> StoredTensor:
    """The tensor `name` with its low-rank update added when it is loaded."""
    weight = tensors.get(name)
    if weight is None or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
        found = "no such tensor" if weight is None else f"shape {list(weight.shape)}"
        raise CheckpointError(
            f"{file}: LoRA of {name} is {list(b.shape)} x {list(a.shape)} and the base has {found}; "
            "give the base model it was trained on as model_base"
        )
    merge = functools.partial(_merge, weight, a, b, scale)
    return StoredTensor(weight.file, weight.key, weight.shape, weight.dtype, merge)


def check_adapter(path_or_hub_id: str | Path) -> None:
    """Raise CheckpointError unless this is an adapter directory."""
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
    """Write an adapter directory, replacing an existing one. It can be read by `add_adapter`, by PEFT (with the base in
    transformers) and, for an original LLaVA, by the original's loader.

    settings  the content of adapter_config.json. Its modules_to_save are stored in the same file as the factors.
    factors   LoRA factors by our names, such as decoder.layers.0.self_attn.q_proj.lora_A.weight.
    others    other trained tensors, by our names.
    config    the model's config. That of an original LLaVA is saved too, since its base may be a bare language model.
    note      the content of NOTE_FILE.
    """
    stored = {name: _PEFT_PREFIX + _beside(config, name) for name in (*factors, *others)}
    modules = settings.get("modules_to_save") or ()
    saved = tuple(f"{_PEFT_PREFIX}{inner}{module}." for module in modules for inner in ("model.", ""))
    held = {**factors, **{name: value for name, value in others.items() if stored[name].startswith(saved)}}
    rest = {stored[name]: value for name, value in others.items() if name not in held}
    with written_whole(path) as directory:
        write_json(directory / ADAPTER_CONFIG, dict(settings))
        file = directory / _ADAPTER_FILES[0]
        save_file({stored[name]: each.contiguous() for name, each in held.items()}, file, metadata={"format": "pt"})
        file.chmod((directory / ADAPTER_CONFIG).stat().st_mode)  # safetensors' mode is 600
        if rest:
            _save_pickled(rest, directory / _EXTRA_FILES[1])
        _describe(directory, config, note)


def save_projector(path: Path, tensors: Mapping[str, torch.Tensor], config: LlavaConfig, note: str | None) -> None:
    """Write a directory with only a trained projector (and newline row), replacing an existing one. The file is
    mm_projector.bin with the original's names, as written by the original's first stage; its second stage, its loader
    and ours read it. Families without an original layout use the names of their own.

    tensors  by our names. config, note: as for `save_adapter`. Without the config of an original LLaVA the directory
             is not a checkpoint, but can be given as `projector_from`.
    """
    names = family_of_config(config).names
    with written_whole(path) as directory:
        spelling: Spelling = "original" if "original" in names.written else config.layout
        stored = {names.to_stored(name, spelling, config): value.contiguous() for name, value in tensors.items()}
        _save_pickled(stored, directory / _PROJECTOR_FILES[1])
        _describe(directory, config, note)


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W [out, in] + scale * B [out, rank] @ A [rank, in], computed in float32, in W's dtype."""
    return (b.float() @ a.float()).mul_(scale).add_(weight).to(weight.dtype)


def _beside(config: LlavaConfig, name: str) -> str:
    """PEFT's name for our tensor `name`: based on transformers 5's names, or on the original's."""
    family = family_of_config(config)
    return family.names.to_stored(name, family.adapter_spelling, config)


def _save_pickled(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch raises a RuntimeError where the disk is full
        torch.save(tensors, file)


def _describe(directory: Path, config: LlavaConfig, note: str | None) -> None:
    if config.layout == "original":
        write_json(directory / "config.json", config.source)
    if note is not None:
        (directory / NOTE_FILE).write_text(note, encoding="utf-8")


def _merge(weight: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float) -> torch.Tensor:
    return merge(weight.load(), a.load(), b.load(), scale)


def _beyond_plain(adapter: Mapping[str, Any], path: Path) -> str | None:
    """Why an adapter is not plain LoRA, as `field value`; None if it is plain. Raises CheckpointError for an adapter
    that cannot be merged at all.
    """
    kind, start = adapter.get("peft_type", "LORA"), adapter.get("init_lora_weights")
    if kind != "LORA":
        return f"peft_type is {kind!r}, which"
    for field, why in _UNMERGEABLE.items():
        if adapter.get(field):
            raise CheckpointError(
                f"{path / ADAPTER_CONFIG}: {field} {adapter[field]!r} cannot be merged: it {why}; "
                "answer with transformers and PEFT, unmerged"
            )
    for lost, what in _LOST_STARTS.items():
        if isinstance(start, str) and start.startswith(lost):
            raise CheckpointError(
                f"{path / ADAPTER_CONFIG}: init_lora_weights {start!r} changed the base by {what}, which the adapter "
                "does not store; save it as plain LoRA (PEFT's path_initial_model_for_weight_conversion), or give the "
                "changed base as model_base and set the field to true"
            )
    if start not in _PLAIN_STARTS:
        return f"init_lora_weights {start!r}"
    others = adapter.keys() - _PLAIN_FIELDS - {"init_lora_weights"}
    return next((f"{field} {adapter[field]!r}" for field in sorted(others) if adapter[field] not in _UNSET), None)


def _scale(adapter: Mapping[str, Any], path: Path) -> float:
    rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
    if not rank or alpha is None:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} lacks r or lora_alpha, which define LoRA's scale")
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first.load(), second.load()))


def _beyond_linears(stored: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], names: NameMap) -> str | None:
    """The first tensor that is neither a LoRA factor of a Linear nor a whole tensor of the base, or None."""
    for key, tensor in stored.items():
        match = _FACTOR.fullmatch(_bare(key))
        ours = names.from_stored(f"{match[1]}.weight" if match else _bare(key))
        known = ours and len(tensor.shape) == 2 if match else ours in base
        if not known:
            return f"{key!r}, which is not a LoRA factor of a Linear in a LLaVA model,"
    return None


def _split(
    stored: Mapping[str, StoredTensor], file: Path, names: NameMap
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
    """(our weight name -> (A, B), our name -> the tensor that replaces the base's)."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    whole = {}
    for key, tensor in stored.items():
        match = _FACTOR.fullmatch(_bare(key))
        name = names.from_stored(f"{match[1]}.weight" if match else _bare(key))
        assert name is not None  # _beyond_linears has excluded it
        if match:
            halves.setdefault(name, {})[match[2]] = tensor
        else:
            whole[name] = tensor
    for name, pair in halves.items():
        if len(pair) == 1:
            raise CheckpointError(f"{file} has lora_{next(iter(pair))} of {name} without the other LoRA factor")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, whole


def _paired(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, tuple[StoredTensor, StoredTensor]], dict[str, StoredTensor]]:
    """(our weight name -> (A, B), the other tensors) of tensors by our names."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        else:
            others[name] = tensor
    for name, pair in halves.items():
        if len(pair) == 1:
            kind, tensor = next(iter(pair.items()))
            raise CheckpointError(f"{tensor.file} has lora_{kind} of {name} without the other LoRA factor")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, others


def _unwrapped(stored: Mapping[str, StoredTensor], names: NameMap) -> dict[str, StoredTensor]:
    """Our names -> tensors of a file whose names may have prefixes of wrappers."""
    return names.name_tensors(stored, lambda key: names.from_stored(_bare(key)))


def _bare(key: str) -> str:
    """A stored name without the prefixes of PEFT (base_model.model.) and DeepSpeed (module.)."""
    return key.removeprefix("module.").removeprefix(_PEFT_PREFIX)


def _first_existing(path: Path, names: tuple[str, ...]) -> Path | None:
    return next((path / name for name in names if (path / name).exists()), None)
