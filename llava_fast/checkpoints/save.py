"""Saves a model in either layout, atomically.

Everything is written to a temporary directory next to the destination and renamed at the end, so that a crash leaves
the destination unchanged. Weights are written shard by shard: at most one shard is copied to the host at a time.
"""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file

from llava_fast.checkpoints.quantisation_config import describe, quantised_modules
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config, fields, writing_family
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.names import HEAD
from llava_fast.models.config import ConfiguredModel, LlavaConfig
from llava_fast.models.fused import separate_parameters
from llava_fast.ops.quantised_linear import QuantisedWeight, dequantise, packing, quantise
from llava_fast.storage.files import Fields, check_fields, one_line, parse_json, read_text, write_json, written_whole

NOTE_FILE = "llava_fast.json"
"""File with settings that only llava_fast reads: "chat_template", the built-in template used in training."""

SIDE_FILES: dict[str, type[Fields] | None] = {
    NOTE_FILE: fields.Note,
    "generation_config.json": fields.Generation,
    "chat_template.jinja": None,
    "chat_template.json": fields.TemplateFile,
    "preprocessor_config.json": fields.ImageProcessor,
    "processor_config.json": fields.Processor,
    "video_preprocessor_config.json": fields.ImageProcessor,
}
"""Small files of a checkpoint that are kept in memory with a loaded model, so that saving can write them back, and
their schemas."""

_HF_ONLY = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_ROWS_MULTIPLE = 64  # vocabularies are rounded up to a multiple of this, as in transformers' conversions


class Deferred(NamedTuple):
    """A tensor that is computed when it is written; `like` has its shape and dtype, on the meta device."""

    like: torch.Tensor
    make: Callable[[], torch.Tensor]


Stored = torch.Tensor | Deferred


def save(
    model: ConfiguredModel,
    path: str | Path,
    layout: Literal["hf", "original"] = "hf",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    tensors: Mapping[str, Stored] | None = None,
) -> None:
    """Write a LlavaModel as safetensors with config, tokenizer and processor files.

    In the layout that it was loaded from, a model keeps its config.json and side files. In the other layout they are
    derived such that each image gets the same tiles. An original checkpoint gets an `<image>` token in Hugging Face's
    layout; new vocabulary rows are the mean of the others, so that greedy decoding never picks them.

    tensors  weights to write instead of the model's, by their names in the model: those gathered from a sharded model,
             or Deferred ones.

    Quantised modules (models.quantised) are written in the compressed-tensors format, only in Hugging Face's layout.

    Raises CheckpointError, and leaves `path` unchanged, if `path` is not empty and `overwrite` is not set, or if the
    layout does not support this model.
    """
    path = check_destination(path, overwrite)
    config, tokenizer = model.config, model.tokenizer
    quantised = quantised_modules(model) if tensors is None else {}
    family = check_layout(config, layout, bool(quantised))
    tensors = dict(separate_parameters(model) if tensors is None else tensors)
    image_token_id, video_token_id = config.image_token_id, config.video_token_id
    if layout == "hf" and config.layout == "original":
        tokenizer, image_token_id, video_token_id = _with_visual_tokens(tokenizer, family.visual_tokens)
        tensors, quantised = _with_vocabulary(
            tensors, quantised, config.embedding, max(image_token_id, video_token_id or 0) + 1
        )
    vocabulary, dtype = _table(tensors, quantised, config.embedding)
    keeps = layout == config.layout and config.source
    tokens = TokenIds(image_token_id, video_token_id, vocab_size=vocabulary)
    written = family.unchanged(config) if keeps else family.write(config, tokens)
    written["dtype" if "dtype" in written else "torch_dtype"] = str(dtype).removeprefix("torch.")
    written.pop("quantization_config", None)
    if quantised:
        written["quantization_config"] = describe(model, family)
    for module, (weight, computes) in quantised.items():
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in _packed(weight, computes).items()}
    stored = {family.names.to_stored(name, layout, config): tensor for name, tensor in tensors.items()}

    with written_whole(path) as directory:
        _write_weights(directory, stored, max_shard_size)
        write_json(directory / "config.json", written)
        for file in directory.glob("*.safetensors"):  # safetensors makes its files readable by their owner only
            shutil.copymode(directory / "config.json", file)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, directory)
        if family.connector_tokenizer is not None and model.connector_tokenizer is not None:
            _save_tokenizer(model.connector_tokenizer, directory / family.connector_tokenizer)
        _write_side_files(directory, config, family, getattr(model, "side_files", {}))


def check_layout(config: LlavaConfig, layout: str, quantised: bool) -> Family:
    """The family that a model is saved as. Raises CheckpointError if `layout` does not support this model, or not its
    quantised weights."""
    if layout not in ("hf", "original"):
        raise CheckpointError(f"layout is {layout!r}; supported are 'hf' and 'original'")
    if quantised and config.layout == "original" and type(family_of_config(config)).other is Family.other:
        raise CheckpointError(
            f"quantised weights of a {config.model_type} cannot be saved: save the model that was loaded without "
            "quantize=, and quantise it each time it is loaded"
        )
    family = writing_family(config, layout)
    if quantised and layout != "hf":
        raise CheckpointError(f"layout {layout!r} does not support quantised weights: save with layout='hf'")
    return family


def check_destination(path: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of a directory to save into. Raises CheckpointError for a file, for a place where nothing can
    be written and, without `overwrite`, for a directory that is not empty.
    """
    path = above = Path(path).expanduser().resolve()
    if path == path.parent:
        raise CheckpointError(f"{path} is the root of a file system; give a directory below it to save into")
    try:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file; give a directory to save into")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise CheckpointError(f"{path} is not empty; choose another directory or pass overwrite=True")
        above = next(each for each in path.parents if each.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be written: {above}: {problem.strerror or problem}") from None
    return path


def read_side_files(path: Path) -> dict[str, str]:
    """The texts of those SIDE_FILES that a checkpoint directory has. Raises CheckpointError for unreadable ones."""
    texts = {}
    for name, kind in SIDE_FILES.items():
        if (path / name).exists():
            texts[name] = read_text(path / name)
            if kind is not None:
                check_fields(parse_json(texts[name], path / name), kind, path / name)
    return texts


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    try:
        tokenizer.save_pretrained(directory)
    except Exception as problem:
        if type(problem) is Exception:  # of the tokenizers library, which has no other for a full disk
            raise OSError(one_line(problem)) from problem
        raise


def _write_side_files(directory: Path, config: LlavaConfig, family: Family, side_files: dict[str, str]) -> None:
    for name, text in side_files.items():
        if name not in _HF_ONLY or family.layout == config.layout == "hf":
            (directory / name).write_text(text, encoding="utf-8")
    if not any((directory / name).exists() for name in _HF_ONLY):
        for name, content in family.processor_files(config).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(directory / name, content)


def _write_weights(directory: Path, stored: dict[str, Stored], max_shard_size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards  # imported late: only saving needs it

    sizes = {name: _sized(each) for name, each in stored.items()}
    if unmade := [name for name, each in stored.items() if isinstance(each, torch.Tensor) and each.is_meta]:
        raise CheckpointError(f"{unmade[0]} is on the meta device and has no values; load weights before saving")
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {name: _made(stored[name]).detach().cpu().contiguous() for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)


def _made(stored: Stored) -> torch.Tensor:
    return stored.make() if isinstance(stored, Deferred) else stored


def _sized(stored: Stored) -> torch.Tensor:
    """A tensor with the size of the one that will be written."""
    return stored.like if isinstance(stored, Deferred) else stored


def _packed(weight: QuantisedWeight, dtype: torch.dtype) -> dict[str, Stored]:
    """The stored tensors of a quantised weight, each computed when it is written."""
    sizes = packing.packed(weight.to("meta"), dtype)
    return {
        name: Deferred(size.to("meta"), functools.partial(_packed_part, weight, dtype, name))
        for name, size in sizes.items()
    }


def _packed_part(weight: QuantisedWeight, dtype: torch.dtype, name: str) -> torch.Tensor:
    return packing.packed(weight, dtype)[name]


def _table(
    tensors: Mapping[str, Stored],
    quantised: Mapping[str, tuple[QuantisedWeight, torch.dtype]],
    embedding: str,
) -> tuple[int, torch.dtype]:
    """(rows of the token embedding, dtype)."""
    if (module := embedding.removesuffix(".weight")) in quantised:
        weight, dtype = quantised[module]
        return weight.shape[0], dtype
    table = _sized(tensors[embedding])
    return len(table), table.dtype


def _with_visual_tokens(tokenizer: Any, placeholders: tuple[str, ...]) -> tuple[Any, int, int | None]:
    """A copy of an original checkpoint's tokenizer with `<image>` (and `<video>`) tokens, and their ids."""
    if tokenizer is None:
        raise CheckpointError("layout 'hf' needs a tokenizer with an image token, and this model has no tokenizer")
    from transformers import AddedToken

    tokenizer = copy.deepcopy(tokenizer)
    known = tokenizer.get_vocab()
    new = [
        AddedToken(placeholder, special=True, normalized=False)
        for placeholder in placeholders
        if placeholder not in known
    ]
    tokenizer.add_tokens(new, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(placeholders))
    return tokenizer, ids[0], ids[1] if len(ids) > 1 else None


def _with_vocabulary(
    tensors: dict[str, Stored],
    quantised: dict[str, tuple[QuantisedWeight, torch.dtype]],
    embedding: str,
    rows: int,
) -> tuple[dict[str, Stored], dict[str, tuple[QuantisedWeight, torch.dtype]]]:
    """Both, extended to at least `rows` vocabulary rows. New rows are the mean of the others: a mean of logits is never
    the largest logit."""
    have, _ = _table(tensors, quantised, embedding)
    if rows <= have:
        return tensors, quantised
    more = -(-rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE - have
    tensors, quantised = dict(tensors), dict(quantised)
    for name in (embedding, HEAD):
        if name in tensors:
            table = _made(tensors[name]).detach()
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            tensors[name] = torch.cat([table, mean.expand(more, -1)])
        if (module := name.removesuffix(".weight")) in quantised:
            weight, dtype = quantised[module]
            sums = [dequantise(weight.rows(block)).sum(0, keepdim=True) for block in weight.blocks()]
            mean = torch.stack(sums).sum(0) / have
            new = quantise(mean.expand(more, -1), weight.scheme, weight.group, weight.zero is None)
            codes, scale = torch.cat([weight.codes, new.codes]), torch.cat([weight.scale, new.scale])
            zero = None if weight.zero is None or new.zero is None else torch.cat([weight.zero, new.zero])
            quantised[module] = QuantisedWeight.unchecked(codes, scale, zero), dtype
    return tensors, quantised
