"""Loads a checkpoint: find it, read its config, and fill a model that was built on the meta device.

    checkpoint = load_checkpoint("llava-hf/llava-1.5-7b-hf")
    with torch.device("meta"):
        model = LlavaModel(checkpoint.config)
    load_weights(model, checkpoint, device="cpu")

Nothing is allocated twice: parameters are assigned one tensor at a time, and a parameter whose dtype and device do not
change is a view of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_fast.checkpoints.adapters import ADAPTER_CONFIG, add_adapter, add_factors, add_projector, find_projector_file
from llava_fast.checkpoints.quantised import StoredQuantised, joined
from llava_fast.checkpoints.save import read_side_files
from llava_fast.errors import CheckpointError, QuantisationError
from llava_fast.families import family_of, fields, find_family
from llava_fast.families.known_towers import tower_tensors
from llava_fast.families.names import HEAD
from llava_fast.models.config import ConfiguredModel, LlavaConfig
from llava_fast.models.quantised import Quantisation, Rounding, plan, put
from llava_fast.ops.quantised_linear import QuantisedWeight
from llava_fast.ops.quantised_linear.memory import in_huge_pages
from llava_fast.storage.files import read_json, read_json_if_there
from llava_fast.storage.hub import resolve
from llava_fast.storage.tensor_files import StoredTensor, has_weights, open_weights

Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint whose config has been read, with its weights still on disk.

    path            directory of config.json and the processor files.
    tokenizer_path  directory of the tokenizer: the same, or the base's for LoRA and projector-only directories.
    config          the model's config.
    tensors         our name -> the stored tensor.
    dtype           dtype of the parameters: the requested one, else that of the base's stored token embedding. (The
                    dtypes of a checkpoint may differ: a CLIP tower from its own repository is float32 beside a float16
                    decoder.)
    device          device of the parameters.
    side_files      texts of the small files (chat template, processor configs) that saving writes back.
    """

    path: Path
    tokenizer_path: Path
    config: LlavaConfig
    tensors: Mapping[str, StoredTensor]
    dtype: torch.dtype
    device: torch.device
    side_files: Mapping[str, str]


def load_checkpoint(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> LoadedCheckpoint:
    """Find a checkpoint (a directory, or a Hub id from the cache or downloaded) and read its config.

    model_base    the model that a LoRA or projector-only directory was trained on; default for LoRA: the one it names.
    vision_tower  location of an original checkpoint's tower, if it differs from its config's. Tower weights in the
                  checkpoint take precedence, since they may have been trained.

    Raises CheckpointError for a directory that is not a LLaVA, an unsupported model, and a missing shard.
    """
    path = resolve(path_or_hub_id)
    described, base, projector = _find(path, model_base)
    source = read_json(described / "config.json")
    family = family_of(source, described / "config.json")
    config, tower = family.read_with_tower(source, described, vision_tower, base)  # first, since its errors are clearer
    tensors = family.names.name_tensors(joined(open_weights(base or path), base or path))
    if (lora := family.built_in_lora(config)) is not None:
        tensors = add_factors(tensors, *lora)
    if projector is not None:
        tensors = add_projector(tensors, projector, family)
    config = tied_as_stored(config, tensors)
    if config.decoder.tie_embeddings and (head := tensors.pop(HEAD, None)) is not None:
        _check_tied(head, tensors.get(config.embedding))
    dtype = dtype or _stored_dtype(tensors, config.embedding, base or path)
    if dtype in config.decoder.overflows_in:
        raise CheckpointError(
            f"{path}: a {config.decoder.family} decoder overflows in {dtype}: load with dtype='bfloat16' or 'float32'"
        )
    if (path / ADAPTER_CONFIG).exists():
        tensors = add_adapter(tensors, path, config, described)
        if config.decoder.tie_embeddings and HEAD in tensors:
            config = _untied(config)
    if tower is not None and not any(name.startswith("vision_tower.") for name in tensors):
        tensors |= tower_tensors(tower, config.vision.num_layers)
    return LoadedCheckpoint(
        path=described,
        tokenizer_path=base or described,
        config=config,
        tensors=tensors,
        dtype=dtype,
        device=torch.device(device),
        side_files=read_side_files(described) | read_side_files(path),
    )


def tied_as_stored(config: LlavaConfig, tensors: Mapping[str, StoredTensor]) -> LlavaConfig:
    """The config with a tied output head if the tensors hold none or one equal to the embedding; unchanged for decoders
    whose config.json says which (`tied_by_file`)."""
    if not config.decoder.tied_by_file:
        return config
    tied = HEAD not in tensors or _same(tensors[HEAD], tensors.get(config.embedding))
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_embeddings=tied))


def load_weights(
    model: ConfiguredModel,
    checkpoint: LoadedCheckpoint,
    device: torch.device | str | Callable[[str], torch.device] | None = None,
    dtype: torch.dtype | None = None,
    quantisation: Quantisation | None = None,
    progress: Progress = list,
) -> None:
    """Assign every parameter of `model` (built on the meta device or not) and the side files that `save` writes back.
    Modules of models.quantised replace the Linears and embeddings whose weights are stored quantised or named by
    `quantisation`, one weight at a time.

    quantisation  which weights to quantise while loading; CheckpointError if the checkpoint is quantised already.
    progress      wraps the iteration over tensor names, like tqdm.

    `device` (or a function that returns each parameter's by its name) and `dtype` default to the checkpoint's. Names
    and shapes are checked first: for tensors that are missing, unexpected or of another shape, CheckpointError lists
    them and nothing is assigned.
    """
    place = torch.device(device) if isinstance(device, str) else device or checkpoint.device
    dtype = dtype or checkpoint.dtype
    parameters = dict(model.named_parameters())
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    check_tensors(expected, checkpoint.tensors, checkpoint.path)
    _check_quantised(model, checkpoint, quantisation)
    roundings = {} if quantisation is None else plan(model, quantisation)
    rounded = {f"{module}.weight" for module in roundings}
    modules = dict(model.named_modules())  # replaced modules are not looked up again
    # Quantise last: a view keeps alive all pages that its mapping has read, and a module that replaces a Linear takes
    # over its bias.
    for name in progress(sorted(parameters, key=lambda name: name in rounded or _is_quantised(name, checkpoint))):
        stored, requires_grad = checkpoint.tensors[name], parameters[name].requires_grad
        owner, _, leaf = name.rpartition(".")
        device = place if isinstance(place, torch.device) else place(name)
        if isinstance(stored, StoredQuantised):
            weight, order = stored.load_quantised()
            put(model, owner, weight.to(device), dtype, None if order is None else order.to(device))
        elif name in rounded:
            put(model, owner, _rounded(stored, roundings[owner], device), dtype)
        else:
            value = _converted(stored.load(), device, dtype)
            setattr(modules[owner], leaf, nn.Parameter(value, requires_grad=requires_grad))
    model.side_files = dict(checkpoint.side_files)


def loaded_sizes(
    model: ConfiguredModel, checkpoint: LoadedCheckpoint, quantisation: Quantisation | None = None
) -> dict[str, int]:
    """Parameter name -> its bytes once `load_weights` has assigned it with these arguments, scales included."""
    roundings = {} if quantisation is None else plan(model, quantisation)
    sizes = {}
    for name, parameter in model.named_parameters():
        stored, rounding = checkpoint.tensors.get(name), roundings.get(name.rpartition(".")[0])
        if isinstance(stored, StoredQuantised):
            sizes[name] = stored.nbytes
        elif rounding is not None and name.endswith(".weight"):
            sizes[name] = int(parameter.numel() * rounding.bits(parameter.shape[1]) / 8)
        else:
            sizes[name] = parameter.numel() * checkpoint.dtype.itemsize
    return sizes


def _converted(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same tensor if nothing changes; a weight converted to another dtype on the CPU lies in huge pages."""
    if device.type != "cpu" or value.dtype == dtype:
        return value.to(device=device, dtype=dtype)
    return in_huge_pages(torch.empty(value.shape, dtype=dtype)).copy_(value)


def _is_quantised(name: str, checkpoint: LoadedCheckpoint) -> bool:
    return isinstance(checkpoint.tensors[name], StoredQuantised)


def _rounded(stored: StoredTensor, rounding: Rounding, device: torch.device) -> QuantisedWeight:
    try:
        return rounding.of(stored.load()).to(device)
    except QuantisationError as problem:
        raise CheckpointError(f"{stored.file}: {stored.key!r}: {problem}") from None


def _check_quantised(model: nn.Module, checkpoint: LoadedCheckpoint, asked: Quantisation | None) -> None:
    """Raise CheckpointError for a weight that is stored quantised but does not belong to a Linear or embedding, and for
    quantising a quantised checkpoint again.
    """
    for name, stored in checkpoint.tensors.items():
        if isinstance(stored, StoredQuantised):
            if asked is not None:
                raise CheckpointError(f"{checkpoint.path} is quantised already: leave quantize out")
            owner, _, leaf = name.rpartition(".")
            if leaf != "weight" or type(model.get_submodule(owner)) not in (nn.Linear, nn.Embedding):
                raise CheckpointError(f"{stored.file}: {stored.key!r} is quantised, and only Linears can be")


def check_tensors(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Raise CheckpointError unless the stored tensors have exactly the expected names and shapes."""
    if missing := sorted(expected.keys() - stored.keys()):
        raise CheckpointError(
            f"{path} lacks {_listed(missing)}; the download is incomplete, or config.json belongs to another model"
        )
    if extra := sorted(stored.keys() - expected.keys()):
        raise CheckpointError(
            f"{path} has {_listed(stored[name].key for name in extra)} that the model described by config.json "
            "does not have; check its layer counts, biases and tie_word_embeddings"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{stored[name].file}: {stored[name].key!r} has shape {list(stored[name].shape)}, but "
                f"config.json implies {list(shape)}; the two files belong to different models"
            )


def _find(path: Path, model_base: str | Path | None) -> tuple[Path, Path | None, Path | None]:
    """(directory of the config.json to use, the base's directory or None, the projector file of a projector-only
    directory or None).
    """
    if (path / ADAPTER_CONFIG).exists():
        model_base = model_base or read_json(path / ADAPTER_CONFIG, fields.Adapter).get("base_model_name_or_path")
        if not model_base:
            raise CheckpointError(f"{path} has LoRA factors but does not name their base; give model_base=")
        base = resolve(model_base)
        own = find_family(read_json_if_there(path / "config.json"))
        return path if own is not None and own.layout == "original" else base, base, None
    projector = None if has_weights(path) else find_projector_file(path)
    if projector is not None:
        if model_base is None:
            raise CheckpointError(f"{path} has only a projector; give model_base= the language model it belongs to")
        return path, resolve(model_base), projector
    read_json(path / "config.json")  # gives the clearest error for a directory that is not a checkpoint
    if model_base is not None:
        raise CheckpointError(f"{path} is a whole model and does not use model_base; leave it out")
    return path, None, None


def _stored_dtype(tensors: Mapping[str, StoredTensor], name: str, path: Path) -> torch.dtype:
    """The dtype of the stored token embedding, or of the final norm if the embedding is quantised. It counts as the
    checkpoint's dtype."""
    if name not in tensors:
        raise CheckpointError(f"{path} has no token embedding, which the model of its config.json needs")
    embedding = tensors[name]
    norm = tensors.get("decoder.norm.weight") if isinstance(embedding, StoredQuantised) else None
    return (norm or embedding).dtype


def _untied(config: LlavaConfig) -> LlavaConfig:
    """The config with an untied output head, also in `source`."""
    if config.decoder.tied_by_file:
        return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_embeddings=False))
    source = {**config.source, "tie_word_embeddings": False}
    if "text_config" in source:
        source["text_config"] = {**source["text_config"], "tie_word_embeddings": False}
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, tie_embeddings=False), source=source)


def _same(head: StoredTensor, embedding: StoredTensor | None) -> bool:
    return embedding is not None and torch.equal(head.load(), embedding.load())


def _check_tied(head: StoredTensor, embedding: StoredTensor | None) -> None:
    """Raise CheckpointError if a tied checkpoint stores a head that differs from the embedding."""
    if embedding is not None and not _same(head, embedding):
        raise CheckpointError(
            f"{head.file}: {head.key!r} differs from the token embedding though config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:most])}{more}"
