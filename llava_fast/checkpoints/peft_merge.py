"""Merges adapters that are more than a low-rank update of Linears, with PEFT.

PEFT gets the base as a module with the names it had in training: transformers' LLaVA for a Hugging Face base; the
language model with projector and newline for an original one. The tower of an original LLaVA is left out, since the
original's trainer adds it after PEFT's layers. Weights are views of their files; only those that the merge replaces
take memory, but all at once (plain LoRA is merged one tensor at a time).

Source: huggingface/peft 0.21, peft_model.py (load_adapter), tuners/tuners_utils.py (merge_and_unload).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config
from llava_fast.families.names import NameMap
from llava_fast.models.config import LlavaConfig
from llava_fast.storage.tensor_files import StoredTensor

_ADAPTER = "default"


def merge_with_peft(
    base: Mapping[str, StoredTensor], path: Path, file: Path, config: LlavaConfig, described: Path, reason: str
) -> dict[str, StoredTensor]:
    """Our names -> tensors of `base`, with those that the merge changes replaced, in the base's dtypes.

    path       the adapter's directory; file: its weights.
    config     the base's config; described: the directory of its config.json.
    reason     why the adapter is not plain LoRA, for errors.

    With tied embeddings the result contains a head only if it differs from the embedding. Raises CheckpointError,
    naming `reason`, if PEFT is missing or cannot load or merge the adapter.
    """
    where = f"{path / 'adapter_config.json'}: {reason}"
    try:
        import peft
    except ImportError:
        raise CheckpointError(f"{where} needs PEFT to be merged: pip install 'llava_fast[train]'") from None
    model, placed = _base_model(base, config, described)
    shared = model.get_input_embeddings().weight
    try:
        with warnings.catch_warnings(record=True) as said, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            settings = peft.PeftConfig.from_pretrained(str(path))
            settings.inference_mode = True
            if settings.is_prompt_learning:
                raise ValueError("it learns a prompt, which cannot be merged into weights")
            adapted = peft.PeftModel(model, settings, _ADAPTER)
            loaded = adapted.load_adapter(str(path), _ADAPTER, torch_device="cpu")
            missing = _missing(adapted, set(loaded.missing_keys))
            _untie(adapted, shared)
            merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as problem:  # PEFT and torch raise many unrelated types
        raise CheckpointError(
            f"{where} cannot be merged by PEFT {peft.__version__} ({' '.join(str(problem).split())}); "
            "answer with transformers and PEFT, unmerged"
        ) from problem
    for warning in said:
        if "Unexpected keyword arguments" in str(warning.message):
            raise CheckpointError(f"{where} is unknown to PEFT {peft.__version__}: upgrade it ({warning.message})")
    for lack, keys in (("the base does not have", loaded.unexpected_keys), ("the file lacks", missing)):
        if keys:
            raise CheckpointError(f"{file}: {lack} {keys[0]!r}; give the base model it was trained on as model_base")
    return _changed(base, merged, placed, file, family_of_config(config).names, config.embedding)


def _base_model(
    base: Mapping[str, StoredTensor], config: LlavaConfig, described: Path
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The base as a module for PEFT, and the tensors that were assigned to it by its names."""
    family = family_of_config(config)
    with torch.device("meta"):
        model: Any = family.adapted_model(config, described / "config.json")
    placed = {
        family.names.to_stored(name, family.adapter_spelling, config): tensor.load()
        for name, tensor in base.items()
        if family.adapters_see_tower or not name.startswith("vision_tower.")
    }
    for name, value in placed.items():
        _place(model, name, value)
    if config.decoder.tie_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model.requires_grad_(False).eval(), placed


def _place(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter `name` of `model`, creating missing modules: Linears for the weights of a projector,
    which the language model of an original LLaVA lacks."""
    *owners, leaf = name.split(".")
    module = model
    for depth, part in enumerate(owners, 1):
        if not hasattr(module, part):
            linear = depth == len(owners) and value.dim() == 2
            fresh = nn.Linear(value.shape[1], value.shape[0], device="meta") if linear else nn.Module()
            module.add_module(part, fresh)
        module = getattr(module, part)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _missing(adapted: nn.Module, keys: set[str]) -> list[str]:
    """Those of PEFT's missing `keys` that are not another name of a loaded parameter."""
    parameters = dict(adapted.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in keys}
    return sorted(key for key in keys if id(parameters.get(key)) not in loaded)


def _untie(adapted: nn.Module, shared: nn.Parameter) -> None:
    """Give every module but the first that has the embedding's weight (a tied head) its own copy: an adapter of one,
    merged into a shared weight, would change the other too."""
    holders = [
        (module, leaf)
        for module in adapted.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter is shared
    ]
    for module, leaf in holders[1:]:
        setattr(module, leaf, nn.Parameter(shared.detach().clone(), requires_grad=False))


def _changed(
    base: Mapping[str, StoredTensor],
    merged: nn.Module,
    placed: Mapping[str, torch.Tensor],
    file: Path,
    names: NameMap,
    embedding: str,
) -> dict[str, StoredTensor]:
    """`base`, with the parameters of `merged` that differ from the tensors in `placed`."""
    found = dict(base)
    for key, parameter in merged.named_parameters(remove_duplicate=False):
        value = parameter.detach()
        if value.is_meta or (key in placed and value.data_ptr() == placed[key].data_ptr()):
            continue
        name = names.from_stored(key)
        if name is None:
            raise CheckpointError(f"{file}: merging it gives {key!r}, which no LLaVA model has")
        like = base.get(name) or base.get(embedding)
        value = value.to(like.dtype) if like else value
        found[name] = StoredTensor.of(file, key, value)
    return found
