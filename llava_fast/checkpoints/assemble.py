"""A new LLaVA, assembled for training from a language model, a vision tower and a projector.

The result is an original LLaVA in memory, with a config.json generated here and read like any other, so that it trains
as in the original code. `save` adds an `<image>` token if Hugging Face's layout is requested.

Sources: haotian-liu/LLaVA c121f04 and LLaVA-VL/LLaVA-NeXT df17966, llava_arch.py (initialize_vision_modules).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from llava_fast.checkpoints.adapters import add_projector, find_projector_file
from llava_fast.checkpoints.load import LoadedCheckpoint, load_checkpoint
from llava_fast.errors import CheckpointError
from llava_fast.families import assembling_family, family_of, family_of_config, fields, find_family
from llava_fast.families.base import Family
from llava_fast.families.known_towers import Tower, tower_tensors
from llava_fast.families.llava_original import LlavaOriginal, original_types
from llava_fast.families.names import HEAD
from llava_fast.families.parts import require
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.storage.files import check_fields, read_json, read_text
from llava_fast.storage.hub import resolve
from llava_fast.storage.tensor_files import StoredTensor, open_weights


class Rope(BaseModel):
    """RoPE scaling for a longer context; LLaVA-NeXT's rope_scaling_type and rope_scaling_factor."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["linear", "dynamic"] = "linear"
    factor: float


class Assembly(BaseModel):
    """The parts of a LLaVA: the section `model:` of a recipe. Comments name the original code's arguments."""

    model_config = ConfigDict(extra="forbid")

    decoder: str  # a Llama, Mistral or Qwen2 language model, with its tokenizer
    vision_tower: str  # a CLIP, SigLIP or SigLIP 2 repository or directory; for a LLaMA-VID LAVIS' eva_vit_g.pth
    projector: str = "mlp2x_gelu"  # mlpNx_gelu, linear, identity, mlp2x_gelu_Norm, gated (mm_projector_type)
    projector_from: str | None = None  # a trained projector: mm_projector.bin, its directory, or a whole LLaVA
    feature_layer: int = -2  # mm_vision_select_layer
    feature: Literal["patch", "cls_patch"] = "patch"  # mm_vision_select_feature
    aspect: str = "pad"  # square, pad, anyres, anyres_max_N, highres, native (image_aspect_ratio)
    pinpoints: str | list[tuple[int, int]] | None = None  # (width, height) pairs or "(1x1),...,(6x6)"
    merge: str = "flat"  # flat, spatial, spatial_unpad, ... (mm_patch_merge_type)
    video_pool: Literal["average", "max", "bilinear"] = "average"  # mm_spatial_pool_mode
    video_pool_stride: int | None = None  # mm_spatial_pool_stride; default: frames keep all their rows
    video_pool_stage: Literal["before", "after"] = "after"  # the projector; before: mm_resampler_type spatial_pool
    video_newline: Literal["grid", "frame", "one_token", "no_token"] = "one_token"  # mm_newline_position
    qformer_from: str | None = None  # the model is a LLaMA-VID with InstructBLIP's Q-Former, LAVIS' file
    compress: str | None = None  # its content rows: null, mean or grid:N (compress_type)
    image_size: Literal[224, 336] = 224  # of its tower, whose positions are interpolated
    rope: Rope | None = None
    settings: dict[str, Any] = {}  # further fields of config.json, which a family of its own has (SliME)
    seed: int = 0  # for initialising the projector and newline


def open_checkpoint(
    model: str | Path | Assembly,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[LoadedCheckpoint, str]:
    """(a checkpoint or assembly with its weights still on disk, its name). options: those of `load_checkpoint`; not
    allowed for an assembly. Raises CheckpointError.
    """
    if not isinstance(model, Assembly):
        return load_checkpoint(model, dtype, device, **options), str(model)
    if given := [name for name, value in options.items() if value is not None]:
        raise CheckpointError(f"{given[0]} cannot be used with a recipe that assembles the model from named parts")
    return assemble(model, dtype, device), model.decoder


def assemble(
    assembly: Assembly, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedCheckpoint:
    """Find the parts. A new projector is initialised like nn.Linear, a newline like the original's.

    Raises CheckpointError for a `decoder` that is not a decoder or already a LLaVA, an unknown tower, and a projector
    of other dimensions.
    """
    base = resolve(assembly.decoder)
    config, tower = describe(assembly, read_json(base / "config.json"), base)
    family = family_of_config(config)
    assert isinstance(family, LlavaOriginal)  # as its config says
    tensors = family.names.name_tensors(open_weights(base))
    if config.decoder.tie_embeddings:
        tensors.pop(HEAD, None)
    tensors |= tower_tensors(tower, config.vision.num_layers)
    fresh, unused = _fresh_parts(config, assembly.seed)
    given = {} if assembly.projector_from is None else _trained_parts(assembly.projector_from, family)
    _check_fits(config.projector, fresh, given, unused, assembly.projector_from)
    parts = family.given_parts(assembly.model_dump())
    tensors |= fresh | {name: tensor for name, tensor in (parts | given).items() if name in fresh}
    generation = base / "generation_config.json"
    return LoadedCheckpoint(
        path=base,
        tokenizer_path=base,
        config=config,
        tensors=tensors,
        dtype=dtype or tensors[config.embedding].dtype,
        device=torch.device(device),
        # The language model's chat template does not know images, so it is not kept.
        side_files={generation.name: read_text(generation)} if generation.is_file() else {},
    )


def describe(assembly: Assembly, decoder: dict[str, Any], path: Path) -> tuple[LlavaConfig, Tower]:
    """The config of an assembled model and the location of its tower, given the decoder's config.json (in directory
    `path`). Raises CheckpointError.
    """
    if find_family(decoder) is not None:
        raise CheckpointError(f"{assembly.decoder} is a LLaVA already: write `model: {assembly.decoder}`")
    kind = require(
        decoder.get("model_type"), tuple(original_types()), "model_type of the decoder", path / "config.json"
    )
    check_fields(decoder, fields.Decoder, path / "config.json")
    if (assembly.compress is not None or assembly.image_size != 224) and assembly.qformer_from is None:
        raise CheckpointError(
            "model.compress and model.image_size need a connector that reads text: give model.qformer_from too"
        )
    parts = assembly.model_dump()
    assembled = assembling_family(parts)
    assert isinstance(assembled, LlavaOriginal)  # whose layout it is
    source = decoder | assembled.assembled_fields(kind, parts)
    if assembly.rope is not None:
        theta = (source.pop("rope_parameters", None) or {}).get("rope_theta", source.get("rope_theta", 10000.0))
        scaling = {"rope_type": assembly.rope.kind, "type": assembly.rope.kind, "factor": assembly.rope.factor}
        source |= {"rope_theta": theta, "rope_scaling": scaling}
    family = family_of(source, path / "config.json")
    assert isinstance(family, LlavaOriginal)  # as mm_vision_tower implies
    if unknown := sorted(assembly.settings.keys() - family.config_fields.model_fields):
        raise CheckpointError(f"settings: {unknown[0]!r} is not a field of a {family.model_types[0]}'s config.json")
    config, tower = family.read_with_tower(source, path)
    return dataclasses.replace(config, source=source | {"mm_hidden_size": config.vision.hidden_size}), tower


def _fresh_parts(config: LlavaConfig, seed: int) -> tuple[dict[str, StoredTensor], set[str]]:
    """The tensors of projector and newline, and the names of those that nothing depends on."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        projector = config.projector.build()
        constants = {id(parameter) for parameter in projector.unused()}
        named = dict(projector.named_parameters(prefix="projector"))
        unused = {name for name, value in named.items() if id(value) in constants}
        made = {name: value.detach() for name, value in named.items()}
        if config.has_newline:
            width = config.decoder.hidden_size
            made["image_newline"] = torch.randn(width) / width**0.5
    return {name: StoredTensor.of(Path("fresh"), name, value) for name, value in made.items()}, unused


def _trained_parts(where: str, family: Family) -> dict[str, StoredTensor]:
    """Projector and newline of a projector file, its directory, or a whole LLaVA."""
    named = Path(where).expanduser()
    file = named if named.is_file() else find_projector_file(resolve(where))
    if file is not None:
        tensors = add_projector({}, file, family)
    else:
        whole = resolve(where)
        own = find_family(read_json(whole / "config.json")) or LlavaOriginal()  # a bare language model has no family
        tensors = own.names.name_tensors(open_weights(whole))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("projector.", "image_newline"))}


def _check_fits(
    config: ConnectorConfig,
    wanted: dict[str, StoredTensor],
    given: dict[str, StoredTensor],
    unused: set[str],
    where: str | None,
) -> None:
    """Raise CheckpointError for a projector of other dimensions. `unused` tensors may be missing."""
    if where is None:
        return
    shapes = [
        {name: each.shape for name, each in tensors.items() if name != "image_newline"} for tensors in (wanted, given)
    ]
    if {name: shape for name, shape in shapes[0].items() if name in shapes[1] or name not in unused} != shapes[1]:
        found = ", ".join(
            f"{name.removeprefix('projector.layers.')} {list(shape)}" for name, shape in shapes[1].items()
        )
        raise CheckpointError(f"projector_from: {where} holds {found or 'no projector'}; the recipe's is {config}")
