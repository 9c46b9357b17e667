"""LoRA adapters in a recipe's model: PEFT inserts them into the decoder's Linears; at the end they are merged.

The weight of an adapted Linear is named `....base_layer.weight`, its factors `....lora_A.default.weight` and `lora_B`.
Source: Hu et al. 2021; huggingface/peft.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava_fast.checkpoints.adapters import merge, save_adapter
from llava_fast.checkpoints.save import NOTE_FILE, Deferred, Stored
from llava_fast.errors import RecipeError
from llava_fast.families import family_of_config
from llava_fast.generation.llava import Llava
from llava_fast.models.quantised import QuantisedLinear
from llava_fast.train.parts import is_factor, part_of
from llava_fast.train.recipe import Lora, Recipe

logger = logging.getLogger("llava_fast.train")
_ADAPTER = ".default"  # PEFT's name of the only adapter


def add_adapters(model: Llava, recipe: Recipe) -> None:
    """Insert the recipe's adapters into the decoder, initialised with the recipe's seed. Parameters that required
    gradients still do, and so do the adapters. Raises RecipeError for a target that is not a Linear of the decoder, and
    without PEFT."""
    assert recipe.lora is not None
    config = _peft_config(recipe.lora)
    kinds = (nn.Linear, QuantisedLinear)
    linears = {name.rpartition(".")[2] for name, module in model.decoder.named_modules() if type(module) in kinds}
    if wrong := [target for target in recipe.lora.targets if target not in linears]:
        raise RecipeError(
            f"lora.targets: {wrong[0]!r} is not a Linear of the decoder; it has {', '.join(sorted(linears))}"
        )
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear as LoraLinear

    config._register_custom_module({QuantisedLinear: LoraLinear})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT supports our Linears despite the warning
        torch.manual_seed(recipe.seed)
        inject_adapter_in_model(config, model.decoder)
    for parameter in trained:  # PEFT freezes all other parameters of the decoder
        parameter.requires_grad_(True)


def merged(whole: Mapping[str, Stored], settings: Lora) -> dict[str, Stored]:
    """Merge the adapters in a model's tensors; the result has the names of a model without adapters. Each adapted
    weight is W + alpha / rank * B @ A, computed in float32 and rounded once to its dtype. `whole` is not changed."""
    found: dict[str, Stored] = {}
    for name, value in whole.items():
        if not is_factor(name):
            module, _, leaf = name.partition(".base_layer.")
            if leaf == "weight":
                a, b = (cast(Tensor, whole[f"{module}.lora_{half}{_ADAPTER}.weight"]) for half in "AB")
                scale = settings.alpha / settings.rank
                if isinstance(value, Deferred):
                    make = functools.partial(_merge_later, value, a, b, scale)
                    found[_own_name(name)] = Deferred(value.like, make)
                else:
                    found[_own_name(name)] = merge(value, a, b, scale)
            else:
                found[_own_name(name)] = value
    return found


def _merge_later(weight: Deferred, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return merge(weight.make().to(a.device), a, b, scale)  # the factors are on the host


def export_adapter(path: Path, whole: Mapping[str, Tensor], trained: list[str], model: Llava, recipe: Recipe) -> None:
    """Write the adapter and other trained parameters without the base, for PEFT and the original LLaVA.

    whole    all tensors of the model with adapters, on the CPU.
    trained  the names of the parameters that required gradients.
    """
    assert recipe.lora is not None
    start = recipe.model
    config = _peft_config(recipe.lora)
    config.base_model_name_or_path = start if isinstance(start, str) else start.decoder
    config.inference_mode = True
    kept = {name for name in trained if not is_factor(name)}
    if not isinstance(start, str):  # an assembled model: the base is a language model without projector and newline row
        parts = {"projector", *map(part_of, kept)} - {"decoder"}
        kept |= {name for name in whole if part_of(name) in parts}
    if model.config.layout == "hf":  # exclude the tower, whose Linears have the same names
        decoder, projector = (_modules_of(part, whole, model) for part in (model.config.embedding, "projector."))
        config.target_modules = rf".*{decoder[0]}.*\.({'|'.join(recipe.lora.targets)})"
        if kept >= {name for name in whole if name.startswith("projector.")}:
            config.modules_to_save = projector
    settings = json.loads(json.dumps(config.to_dict(), default=sorted))  # PEFT's sets become lists
    save_adapter(
        path,
        settings,
        {name.replace(_ADAPTER, ""): value for name, value in whole.items() if is_factor(name)},
        {_own_name(name): value for name, value in whole.items() if name in kept},
        model.config,
        model.side_files.get(NOTE_FILE),
    )


def _modules_of(part: str, whole: Mapping[str, Tensor], model: Llava) -> list[str]:
    """The modules of transformers' model that hold the tensors whose names start with `part`. PEFT saves and loads
    modules, so a parameter outside of any (a Q-Former's query tokens) is logged: only llava_fast reads it again."""
    family = family_of_config(model.config)
    stored = [
        family.names.to_stored(_own_name(name), family.adapter_spelling, model.config)
        for name in whole
        if name.startswith(part) and not is_factor(name)
    ]
    owners = [name.removeprefix("model.").rpartition(".")[0] or None for name in stored]
    bare = [name for name, owner in zip(stored, owners, strict=True) if owner is None]
    if bare:
        logger.warning("PEFT cannot read %s, which no module owns: load the adapter with llava_fast", ", ".join(bare))
    return sorted({owner.partition(".")[0] for owner in owners if owner is not None})


def _peft_config(settings: Lora) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise RecipeError("`lora` needs PEFT: pip install 'llava_fast[train]', or leave the section out") from None
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=settings.targets
    )


def _own_name(name: str) -> str:
    return name.replace(".base_layer.", ".")
