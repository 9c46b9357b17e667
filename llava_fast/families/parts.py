"""What families share: parts read from transformers configs, and the fields that most config.json files have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.inputs.pictures.preprocessing import Filter, Fit, Preprocessing, standard_fit
from llava_fast.models.config import LlavaConfig
from llava_fast.models.decoders import DECODERS
from llava_fast.models.decoders.base import DecoderConfig
from llava_fast.models.towers import TOWERS
from llava_fast.models.towers.base import TowerConfig
from llava_fast.storage.files import Fields, check_fields, one_line

READ_METHODS = ("compressed-tensors", "awq", "gptq", "torchao")
"""quant_method of config.json's quantization_config: those that checkpoints.quantised reads."""


def tower_config(tower, file: Path, **choices) -> TowerConfig:
    """A TowerConfig from a transformers vision config; `choices` are the fields that it does not have."""
    kind = TOWERS[require(tower.model_type, tuple(TOWERS), "vision_config.model_type", file)]
    _check_whole(tower, kind.hf_fields or fields.Tower, file)
    config = _made(file, kind.from_hf, tower, **choices)
    check_feature_layers(config, file)
    return config


def _made(file: Path, make: Callable[..., Any], *given: Any, **choices: Any) -> Any:
    """make(...); its ValueError becomes a CheckpointError that names the file."""
    try:
        return make(*given, **choices)
    except ValueError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def check_feature_layers(tower: TowerConfig, file: Path) -> None:
    """Raises CheckpointError for a hidden state that the tower does not have."""
    for layer in tower.feature_layers:
        if not -tower.num_layers - 1 <= layer <= tower.num_layers:
            raise CheckpointError(f"{file}: a tower of {tower.num_layers} layers has no feature layer {layer}")


def decoder_config(text, file: Path, tied: bool) -> DecoderConfig:
    """A DecoderConfig from a transformers text config."""
    family = DECODERS[require(text.model_type, tuple(DECODERS), "text_config.model_type", file)]
    _check_whole(text, family.hf_fields or fields.Decoder, file)
    return _made(file, family.from_hf, text, tied)


def _check_whole(config: Any, kind: type[Fields], file: Path) -> None:
    """Check the config that transformers made against the bounds of the file's fields; no field may be missing."""
    check_fields({name: getattr(config, name, None) for name in kind.model_fields}, kind, file, sparse=False)


def require(value: Any, supported: tuple[str, ...], field: str, file: Path) -> Any:
    """`value` if it is supported, else a CheckpointError that names the field and lists what is."""
    if value not in supported:
        raise CheckpointError(f"{file}: {field} is {value!r}; supported are {', '.join(supported)}")
    return value


def refuse_quantised(source: dict[str, Any], file: Path) -> None:
    """Raises CheckpointError for a checkpoint that is quantised by a method that checkpoints.quantised cannot read."""
    if config := source.get("quantization_config"):
        method = config.get("quant_method", "unknown")
        if method not in READ_METHODS:
            raise CheckpointError(
                f"{file}: it is quantised ({method}); load the unquantised checkpoint it was made from, or one by "
                f"{', '.join(READ_METHODS)}"
            )


def eos_token_ids(generation: dict[str, Any], *others: int | list[int] | None) -> tuple[int, ...]:
    """The end tokens of an answer: from generation_config.json (null: none), else the first of `others` that is set. A
    number, a list or nothing.
    """
    stated = generation.get("eos_token_id", first(*others))
    return () if stated is None else tuple(stated) if isinstance(stated, list) else (stated,)


def auto_config(source: dict[str, Any], file: Path, decodes: bool = True):
    """The content of a config.json as transformers reads it; CheckpointError if it cannot. `decodes`: its text half is
    a decoder and is checked; that of a tower's own repository is not.
    """
    from transformers import CONFIG_MAPPING  # imported late: it takes seconds

    kind = source.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{file}: model_type is {kind!r}, which transformers does not know")
    sections = {"vision_config": tuple(TOWERS)} | ({"text_config": tuple(DECODERS)} if decodes else {})
    for section, supported in sections.items():
        if (given := (source.get(section) or {}).get("model_type")) is not None:
            require(given, supported, f"{section}.model_type", file)
    try:
        return CONFIG_MAPPING[kind](**copy.deepcopy(source))  # from_dict would also log it, which takes longer
    except Exception as problem:  # transformers' validators raise many unrelated types
        raise CheckpointError(f"{file}: transformers cannot read it: {one_line(problem)}") from problem


def token_id(tokenizer: Any, token: str, config: LlavaConfig) -> int:
    """The id of a token that must be in the tokenizer, and in the decoder's vocabulary. Raises CheckpointError."""
    found = tokenizer.get_vocab().get(token)
    if found is None or found >= config.decoder.vocab_size:
        raise CheckpointError(
            f"prompts of a {config.model_type} model contain {token!r}, but its tokenizer gives it the id {found}, and "
            f"vocab_size is {config.decoder.vocab_size}: use the tokenizer with which it was trained"
        )
    return found


def first(*values):
    return next((value for value in values if value is not None), None)


def tower_fields(vision: TowerConfig) -> dict[str, Any]:
    """A transformers vision config, without a pooling head."""
    vision = vision.plain
    return {"model_type": TOWERS.name_of(type(vision)), **vision.to_hf()}


def tower_preprocessing(
    vision: TowerConfig, aspect: Any, fit: Fit | None, filter: Filter, convert_rgb: bool = True
) -> Preprocessing:
    values = {name: getattr(vision, name) for name in Preprocessing.VALUES}
    return Preprocessing(fit or standard_fit(aspect, vision.image_size), filter, do_convert_rgb=convert_rgb, **values)


def eos_field(config: LlavaConfig) -> int | list[int] | None:
    ids = list(config.eos_token_ids)
    return (ids[0] if len(ids) == 1 else ids) or None
