"""Writes the trained model as a checkpoint that `llava_fast.load` and other libraries read."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from llava_fast.checkpoints.adapters import save_projector
from llava_fast.checkpoints.save import NOTE_FILE, Deferred, Stored, save
from llava_fast.generation.llava import Llava
from llava_fast.models.quantised import Quantised, is_quantised
from llava_fast.train.lora import export_adapter, merged
from llava_fast.train.objective import processor_of
from llava_fast.train.parallel import World
from llava_fast.train.parts import part_of
from llava_fast.train.recipe import Recipe


def export(recipe: Recipe, model: nn.Module, bare: Llava, world: World) -> Path:
    """Write the model to the recipe's output in the recipe's precision, and return its directory (`output`/model). LoRA
    adapters are merged, and also written separately (`output`/adapter). If only the projector was trained, it is also
    written separately (`output`/projector), in float32.

    model: possibly wrapped, as all processes run it; bare: the same model without wrappers. A collective.
    """
    path = recipe.output / "model"
    dtype = getattr(torch, recipe.precision)
    whole = _whole(model, bare, dtype)
    if world.first:
        for kind in ("saving", "replaced"):  # left over from a killed export
            for leftover in recipe.output.glob(f".*.{kind}-*"):
                shutil.rmtree(leftover)
        if recipe.data.template:  # else the base model's template is saved
            note = json.dumps({"chat_template": processor_of(bare).template.name})
            bare.side_files = {**getattr(bare, "side_files", {}), NOTE_FILE: note}
        made = {name: each for name, each in whole.items() if not isinstance(each, Deferred)}
        trained = [name for name, parameter in bare.named_parameters() if parameter.requires_grad]
        if recipe.lora is not None:
            export_adapter(recipe.output / "adapter", made, trained, bare, recipe)
            whole = merged(whole, recipe.lora)
        elif {part_of(name) for name in trained} == {"projector"}:
            alone = {name: tensor for name, tensor in made.items() if part_of(name) == "projector"}
            note_file = bare.side_files.get(NOTE_FILE)
            save_projector(recipe.output / "projector", alone, bare.config, note_file)
        tensors = {name: each if isinstance(each, Deferred) else each.to(dtype) for name, each in whole.items()}
        save(bare, path, layout=recipe.layout, overwrite=True, tensors=tensors)
    world.together()
    return path


def _whole(model: nn.Module, bare: Llava, dtype: torch.dtype) -> dict[str, Stored]:
    """All tensors by their names in `bare`, on the CPU; quantised weights are dequantised to `dtype` when they are
    written."""
    if not is_quantised(bare):
        everything = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return cast(dict[str, Stored], everything)
    whole: dict[str, Stored] = {name: parameter.detach().cpu() for name, parameter in bare.named_parameters()}
    for name, module in bare.named_modules():
        if isinstance(module, Quantised):
            like = torch.empty(module.quantised.shape, dtype=dtype, device="meta")
            whole[f"{name}.weight"] = Deferred(like, functools.partial(module.dense, dtype))
    return whole
