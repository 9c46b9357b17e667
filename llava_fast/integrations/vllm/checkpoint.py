"""A checkpoint that vLLM serves: its visual half as this package has it, and whose each tensor is. Knows no vLLM."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llava_fast.errors import CheckpointError, LlavaFastError
from llava_fast.families import FAMILIES
from llava_fast.families.llava import Llava
from llava_fast.families.names import NameMap
from llava_fast.integrations.vllm import ARCHITECTURES, SWITCH
from llava_fast.models.config import VisualConfig
from llava_fast.models.visual import VisualModel
from llava_fast.storage.hub import resolve


class Unserved(ValueError):
    """Why a checkpoint is left to vLLM's own class."""


class Visual(NamedTuple):
    """The visual half of a checkpoint: what it is, without layers that never run, and the names of its tensors."""

    config: VisualConfig
    names: NameMap


def read_visual(model: str, revision: str | None, hf: Any) -> Visual:
    """`hf` is the transformers config that vLLM read of `model`, a directory or a Hub id. Raises Unserved."""
    return _read(model, revision, _Config(hf))


class _Config:
    """A transformers config as a key."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.text = hf, hf.to_json_string()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.text == other.text


@functools.lru_cache(maxsize=8)
def _read(model: str, revision: str | None, given: _Config) -> Visual:
    hf = given.hf
    if hf.model_type not in ARCHITECTURES.values():
        raise Unserved(f"its model_type is {hf.model_type!r}")
    family = FAMILIES[hf.model_type]()
    assert isinstance(family, Llava)
    try:
        config = family.visual(hf, Path(resolve(model, ["*.json"], revision)))
    except LlavaFastError as problem:
        raise Unserved(str(problem)) from problem
    if config.vision.native_sizes:
        raise Unserved("its tower reads images at their own sizes")
    return Visual(dataclasses.replace(config, vision=config.vision.shortened()), family.names)


Whose = Literal["visual", "decoder", "nobody"]


def sort_tensors(names: NameMap, layers: int, stored: Iterable[str]) -> Iterator[tuple[Whose, str]]:
    """Whose each stored tensor is, and its name there: a parameter of a VisualModel with so many tower layers, or a
    tensor of the language model as transformers 4 spells it, which every vLLM reads."""
    for name in stored:
        if names.is_skipped(name):
            yield "nobody", name
            continue
        ours = names.from_stored(name)
        if ours is None:  # of a language model that only vLLM knows
            yield "decoder", name
        elif ours.startswith("decoder."):
            yield "decoder", names.by_rules(ours, "hf")
        elif (layer := re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", ours)) and int(layer[1]) >= layers:
            yield "nobody", ours
        else:
            yield "visual", ours


class Loader:
    """Fills a VisualModel from a stream of stored tensors, and passes on those of the language model."""

    def __init__(self, visual: VisualModel | None, names: NameMap) -> None:
        self.visual, self.names = visual, names
        self.loaded: set[str] = set()

    def rest(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the language model, while the others are copied into the visual model: all are once this
        is used up. Raises CheckpointError for a tensor with no place, and one of another shape."""
        parameters = {} if self.visual is None else dict(self.visual.named_parameters())
        layers = 0 if self.visual is None else self.visual.config.vision.num_layers
        for stored, tensor in weights:
            ((whose, name),) = sort_tensors(self.names, layers, [stored])
            if whose == "decoder":
                yield name, tensor
            elif whose == "visual" and self.visual is not None:
                self._copy(stored, tensor, name, parameters.get(name))

    def _copy(self, stored: str, tensor: Tensor, name: str, parameter: Tensor | None) -> None:
        if parameter is None or parameter.shape != tensor.shape or not tensor.is_floating_point():
            has = "no such tensor" if parameter is None else f"{list(parameter.shape)}"
            raise CheckpointError(
                f"the checkpoint's {stored!r} is {tensor.dtype} {list(tensor.shape)}, and the tower and projector of "
                f"its config.json have {has}; {SWITCH}=0 starts vLLM without llava_fast"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
        self.loaded.add(name)

    def missing(self) -> list[str]:
        """Parameters that no tensor was loaded into and that run."""
        if self.visual is None:
            return []
        unused = {id(p) for module in self.visual.vision_tower.unused() for p in module.parameters()}
        return [n for n, p in self.visual.named_parameters() if n not in self.loaded and id(p) not in unused]
