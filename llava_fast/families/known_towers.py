"""Vision towers of original LLaVA checkpoints: named in config.json, described and often stored elsewhere.

Sources: the config.json files of openai/clip-vit-large-patch14-336, openai/clip-vit-large-patch14 and
google/siglip-so400m-patch14-384 (transformers 5.23 has the same numbers in CLIPTowerConfig and
SiglipTowerConfig and their tests); LLaVA-VL/LLaVA-NeXT df17966 multimodal_encoder/siglip_encoder.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.llava_names import from_tower_repository
from llava_fast.families.native_sizes import native_preprocessing
from llava_fast.families.parts import auto_config, require, tower_config
from llava_fast.families.preprocessing import (
    Settings,
    check_anyres,
    image_kind,
    image_settings,
    read_preprocessing,
    tower_kind,
)
from llava_fast.inputs.pictures.preprocessing import Preprocessing
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.vit import ClipConfig, SiglipConfig
from llava_fast.storage.files import read_json
from llava_fast.storage.hub import local_directory, resolve
from llava_fast.storage.tensor_files import StoredTensor, open_weights

_CLIP_L = ClipConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=24,
    num_heads=16,
    image_size=336,
    patch_size=14,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
)
_SIGLIP_SO400M = SiglipConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_layers=27,
    num_heads=16,
    image_size=384,
    patch_size=14,
    activation="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
KNOWN_TOWERS: dict[str, TowerConfig] = {
    "openai/clip-vit-large-patch14-336": _CLIP_L,
    "openai/clip-vit-large-patch14": dataclasses.replace(_CLIP_L, image_size=224),
    "google/siglip-so400m-patch14-384": _SIGLIP_SO400M,
}
"""Towers whose config needs no file, as in their own repositories (with all layers)."""


@dataclass(frozen=True)
class Tower:
    """A named tower: its config in its own repository, the repository (a directory or a Hub id), and its image
    processor.
    """

    config: TowerConfig
    home: str | Path
    preprocessing: Preprocessing
    settings: Settings

    def check_anyres(self) -> None:
        """Raises CheckpointError if its processor makes AnyRes tiles of another size than the tower's."""
        check_anyres(self.settings, tower_kind(self.config), self.config.image_size)

    def tensors(self, num_layers: int) -> dict[str, StoredTensor]:
        """Its tensors by our names: the first `num_layers` layers, no text encoder. Raises CheckpointError."""
        tensors: dict[str, StoredTensor] = {}
        for key, tensor in open_weights(resolve(self.home)).items():
            name = from_tower_repository(key)
            if name is not None and layer_of(name) < num_layers:
                tensors[name] = tensor
        return tensors


def find_tower(name: str, checkpoint: Path, override: str | Path | None = None) -> Tower:
    """The tower that a checkpoint calls `name`: `override` if given, else a directory of that name inside the
    checkpoint or here, else a known repository of that last path component, else a Hub id.

    Raises CheckpointError if it is none of these, or not a CLIP, SigLIP or SigLIP 2 tower.
    """
    wanted = str(override or name)
    for place in (checkpoint / wanted, wanted):
        if (directory := local_directory(place)) is not None:
            return _read_tower(directory)
    for repository, config in KNOWN_TOWERS.items():
        if Path(wanted).name == Path(repository).name:
            settings = Settings({}, repository)
            return Tower(config, repository, _read_preprocessing(settings, config, config.image_size), settings)
    try:
        directory = resolve(wanted)
    except CheckpointError as problem:
        raise CheckpointError(
            f"{checkpoint / 'config.json'} names the vision tower {name!r}, which is not available; "
            f"give vision_tower= a directory or repository that has it ({problem})"
        ) from problem
    return _read_tower(directory)


def tower_tensors(tower: Tower, num_layers: int) -> dict[str, StoredTensor]:
    """The tower's tensors from its own repository, under our names: its first `num_layers` layers."""
    return tower.tensors(num_layers)


def layer_of(name: str) -> int:
    """The layer of a tensor by our name; -1: it is of none."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _read_preprocessing(settings: Settings, tower: TowerConfig | type[TowerConfig], tile: int) -> Preprocessing:
    """The original code always converts images to RGB, regardless of the file."""
    if tower.native_sizes:
        return dataclasses.replace(native_preprocessing(settings, tile), do_convert_rgb=True)
    kind = tower_kind(tower)
    image_kind(settings, (kind,))
    return dataclasses.replace(read_preprocessing(settings, kind, tile), do_convert_rgb=True)


def _read_tower(directory: Path) -> Tower:
    """The tower of its own repository, which has a whole model or only its vision part."""
    file = directory / "config.json"
    config = auto_config(read_json(file, fields.TowerHome), file, decodes=False)
    config = getattr(config, "vision_config", config)
    kind = TOWERS[require(config.model_type, tuple(TOWERS), "model_type of the vision tower", file)]
    settings = image_settings(directory)
    preprocessing = _read_preprocessing(settings, kind, kind.tile_side(config))
    return Tower(tower_config(config, file, **preprocessing.values()), directory, preprocessing, settings)
