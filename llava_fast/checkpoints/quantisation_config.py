"""config.json's quantization_config of a quantised model in the compressed-tensors format.

Modules are named by patterns that match both the names in the files and those in transformers, since readers match
either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llava_fast.errors import CheckpointError
from llava_fast.families.base import Family
from llava_fast.models.config import ConfiguredModel
from llava_fast.models.fused import MergedLinear
from llava_fast.models.quantised import Quantised
from llava_fast.ops.quantised_linear import QuantisedWeight

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def quantised_modules(model: nn.Module) -> dict[str, tuple[QuantisedWeight, torch.dtype]]:
    """Name -> (weight, compute dtype) of every quantised module. Raises CheckpointError for a weight that the format
    cannot store."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantised):
            if module.order is not None:
                raise CheckpointError(
                    f"{name} has GPTQ's act-order (desc_act), which compressed-tensors cannot store: keep the "
                    "checkpoint that it came from"
                )
            found[name] = module.quantised, module.dtype
    return found


def describe(model: ConfiguredModel, family: Family) -> dict[str, Any]:
    """quantization_config: one group per scheme with its modules, and the list of unquantised Linears."""
    groups: dict[tuple[int, int | None, bool], list[str]] = {}
    dense = []
    for name, module in model.named_modules():
        if isinstance(module, Quantised):
            weight = module.quantised
            group = None if weight.scheme == "int8" and weight.group == weight.shape[1] else weight.group
            scheme = (8 if weight.scheme == "int8" else 4, group, weight.zero is None)
            groups.setdefault(scheme, []).append(name)
        elif isinstance(module, MergedLinear):  # stored as its separate parts
            parent = name.rpartition(".")[0]
            dense += [f"{parent}.{part}" if parent else part for part in module.names]
        elif isinstance(module, nn.Linear):
            dense.append(name)
    every = [name for names in (*groups.values(), dense) for name in names]
    written = {}
    for number, ((bits, group, symmetric), names) in enumerate(sorted(groups.items(), key=str)):
        written[f"group_{number}"] = {
            "targets": _patterns(names, every, model, family),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group is None else "group",
                "group_size": group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": written,
        "ignore": _patterns(dense, every, model, family),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _patterns(names: list[str], every: Iterable[str], model: ConfiguredModel, family: Family) -> list[str]:
    """Patterns ("re:...") of modules in every spelling of the family's files; one per module that all layers have."""
    layers: dict[str, set[str]] = {}
    for name in every:
        layers.setdefault(_LAYER.sub(".layers.*.", name), set()).add(name)
    spellings = [spelling for spelling in family.names.written if spelling != "original"]
    patterns: dict[str, None] = {}
    for name in names:
        whole = layers[_LAYER.sub(".layers.*.", name)] <= set(names)
        spelled = []
        for spelling in spellings:
            stored = family.names.to_stored(f"{name}.weight", spelling, model.config).removesuffix(".weight")
            pattern = re.escape(stored)
            if whole and (match := _LAYER.search(stored)) is not None:
                pattern = pattern.replace(rf"\.layers\.{match[1]}\.", r"\.layers\.\d+\.")
            spelled.append(pattern)
        patterns[f"re:({'|'.join(spelled)})$"] = None
    return list(patterns)
