"""Low-rank adapters in a recipe's model: PEFT puts them into the decoder's Linears, and merges them at the end.

An adapted Linear's own weight is called `....base_layer.weight`, its factors `....lora_A.default.weight` and `lora_B`.
Source: Hu et al. 2021; huggingface/peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.checkpoints.adapters import save_adapter
from llava_fast.errors import RecipeError
from llava_fast.generation.llava import Llava
from llava_fast.train.optim import part_of
from llava_fast.train.recipe import Lora, Recipe

_ADAPTER = ".default"  # PEFT's name of the only adapter


def add_adapters(model: Llava, recipe: Recipe) -> None:
    """Put the recipe's adapters into the decoder, drawn by the recipe's seed. What required gradients still does, and
    the adapters do. Raises RecipeError for a target that is no Linear of the decoder, or without PEFT."""
    assert recipe.lora is not None
    config = _peft_config(recipe.lora)
    linears = {name.rpartition(".")[2] for name, module in model.decoder.named_modules() if type(module) is nn.Linear}
    if wrong := [target for target in recipe.lora.targets if target not in linears]:
        raise RecipeError(
            f"lora.targets: {wrong[0]!r} is no Linear of the decoder; it has {', '.join(sorted(linears))}"
        )
    from peft import inject_adapter_in_model

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        inject_adapter_in_model(config, model.decoder)
    for parameter in trained:  # PEFT freezes everything in the decoder that is no adapter
        parameter.requires_grad_(True)


def merged(whole: Mapping[str, Tensor], settings: Lora) -> dict[str, Tensor]:
    """A model's tensors, by the names it has without adapters, from those with adapters: each adapted weight as PEFT
    merges it, computed in float32 and rounded once to the weight's dtype. `whole` stays as it is."""
    found = {_own_name(name): value for name, value in whole.items() if not _is_factor(name)}
    for name in whole:
        module, mark, _ = name.partition(f".lora_A{_ADAPTER}.weight")
        if mark:
            found[f"{module}.weight"] = _merge_one(module, whole, settings)
    return found


def export_adapter(path: Path, whole: Mapping[str, Tensor], trained: list[str], model: Llava, recipe: Recipe) -> None:
    """Write the adapter, and what else was trained, apart from the base: the original LLaVA's files.

    whole    all tensors of the model with adapters, on the CPU.
    trained  the names of those that required gradients.
    """
    assert recipe.lora is not None
    start = recipe.model
    config = _peft_config(recipe.lora)
    config.base_model_name_or_path = start if isinstance(start, str) else start.decoder
    config.inference_mode = True
    kept = {name for name in trained if not _is_factor(name)}
    if not isinstance(start, str):  # the base, a language model, has neither projector nor newline row
        parts = {"projector", *map(part_of, kept)} - {"decoder"}
        kept |= {name for name in whole if part_of(name) in parts}
    save_adapter(
        path,
        _plain(config.to_dict()),
        {name.replace(_ADAPTER, ""): whole[name] for name in whole if _is_factor(name)},
        {_own_name(name): whole[name] for name in whole if name in kept},
        model.config,
    )


def _peft_config(settings: Lora) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise RecipeError("`lora` needs PEFT: pip install 'llava_fast[train]', or leave the section out") from None
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=settings.targets
    )


def _merge_one(module: str, whole: Mapping[str, Tensor], settings: Lora) -> Tensor:
    from peft import inject_adapter_in_model

    prefix = f"{module}."
    own = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    weight = own["base_layer.weight"].clone()  # PEFT merges in place
    with torch.device("meta"):
        alone = nn.ModuleDict({"q": nn.Linear(weight.shape[1], weight.shape[0], bias="base_layer.bias" in own)})
        alone = inject_adapter_in_model(_peft_config(settings.model_copy(update={"targets": ["q"]})), alone)
    alone.q.load_state_dict({**own, "base_layer.weight": weight}, assign=True)
    alone.q.merge()
    return alone.q.base_layer.weight.detach()


def _is_factor(name: str) -> bool:
    return "lora_" in name


def _own_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _plain(value: Any) -> Any:
    """PEFT's fields as JSON holds them: sets become sorted lists, enumerations their values."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (set, list, tuple)):
        return sorted(value) if isinstance(value, set) else [_plain(each) for each in value]
    return getattr(value, "value", value)
