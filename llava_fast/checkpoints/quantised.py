"""Reads quantised checkpoints: joins the tensors of each quantised weight to one stored tensor under its name.

Supported are compressed-tensors (pack-quantized and int-quantized, 4 and 8 bits) and, by conversion, AWQ (AutoAWQ's
"gemm"), GPTQ (4 and 8 bits, both zero-point conventions, act-order) and torchao's symmetric 8-bit codes. Other formats
are rejected by name.

Sources: vllm-project/compressed-tensors 0.20; casper-hansen/AutoAWQ (modules/linear/gemm.py: column order within a
word); AutoGPTQ and ModelCloud/GPTQModel (qlinear: rows within a word, "gptq" stores zero points minus one);
pytorch/ao 0.18 (prototype/safetensors: the names of a tensor's parts).
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from llava_fast.errors import CheckpointError, QuantisationError
from llava_fast.models.quantised import Quantisation
from llava_fast.ops.quantised_linear import GROUPS, QuantisedWeight, dequantise, packing
from llava_fast.ops.quantised_linear.reference import pack, unpack
from llava_fast.storage.files import Fields, check_fields, read_json
from llava_fast.storage.tensor_files import StoredTensor

logger = logging.getLogger("llava_fast.quantised")
Made = tuple[QuantisedWeight, Tensor | None]
"""A weight and, for act-order, the input element of each of its columns (int64 [in])."""


@dataclass(frozen=True, eq=False)
class StoredQuantised(StoredTensor):
    """A weight [out, in] that is stored quantised: `load` dequantises it, `load_quantised` does not. `nbytes` are those
    of the latter: codes, float32 scales, and zero points of one byte."""

    load_quantised: Callable[[], Made]
    nbytes: int


class Group(Fields):
    """One scheme of compressed-tensors and its modules."""

    weights: dict[str, Any] | None = None
    input_activations: dict[str, Any] | None = None
    format: str | None = None


class CompressedTensors(Fields):
    """quantization_config of compressed-tensors."""

    config_groups: Annotated[dict[str, Group], Field(max_length=256)] | None = None
    format: str | None = None


class Weights(Fields):
    """How compressed-tensors quantises the weights of a group."""

    num_bits: int
    type: str = "int"
    strategy: str | None = None
    symmetric: bool = True
    group_size: Annotated[int, Field(ge=-1, le=2**20)] | None = None


class Packed(Fields):
    """quantization_config of AWQ and GPTQ."""

    bits: int
    group_size: Annotated[int, Field(ge=-1, le=2**20)] = 128
    version: str = "gemm"
    checkpoint_format: str = "gptq"


def quantisation_of(path: Path) -> tuple[dict[str, Any], Path] | None:
    """(quantization_config, its file) of the checkpoint in a directory; None if it is not quantised. Raises
    CheckpointError."""
    file, older = path / "config.json", path / "quantize_config.json"
    config = read_json(file).get("quantization_config")
    if config is None and os.path.lexists(older):  # GPTQ's file before transformers supported it
        file, config = older, {"quant_method": "gptq", **read_json(older)}
    if not config:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: quantization_config is not an object")
    return config, file


def scheme_of(config: Mapping[str, Any]) -> Quantisation | None:
    """About how the weights of a checkpoint with this config.json are quantised, for estimates before its files are
    there: the scheme of most Linears; the head only where compressed-tensors names it. None if they are not, or in a
    way that `joined` refuses."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") not in _READERS:
        return None
    groups: list[Any] = list((found.get("config_groups") or {}).values())
    weights = [group["weights"] for group in groups if isinstance(group, dict) and group.get("weights")]
    bits = found.get("bits", 8 if found["quant_method"] == "torchao" else 4)
    one = {"num_bits": bits, "group_size": found.get("group_size"), "symmetric": False}
    most = min(weights, key=lambda each: each.get("num_bits", 8), default=one)
    int8, size = most.get("num_bits", 8) == 8, most.get("group_size")
    group = size if size in GROUPS else None if int8 else max(GROUPS)
    head = "int8" if any("lm_head" in str(group.get("targets")) for group in groups) else None
    return Quantisation("int8" if int8 else "int4", group, symmetric=int8 or most.get("symmetric", True), head=head)


def joined(stored: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint in `path`, with the parts of each quantised weight joined under its name; unchanged
    if it is not quantised. Raises CheckpointError for an unsupported quantisation."""
    if (found := quantisation_of(path)) is None:
        return dict(stored)
    config, file = found
    method = config.get("quant_method", "unknown")
    if method not in _READERS:
        raise CheckpointError(f"{file}: it is quantised ({method}); load the unquantised checkpoint it was made from")
    tensors = _READERS[method](stored, config, file)
    if not any(isinstance(tensor, StoredQuantised) for tensor in tensors.values()):
        raise CheckpointError(
            f"{file}: quantization_config ({method}) is present, but no stored weight is quantised: remove "
            "quantization_config, or download the weights again"
        )
    return tensors


def _compressed_tensors(stored: Mapping[str, StoredTensor], config: dict, file: Path) -> dict[str, StoredTensor]:
    check_fields(config, CompressedTensors, file)
    for unread in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if config.get(unread):
            raise _refused(file, f"compressed-tensors with {unread}")
    schemes: dict[int, list[dict[str, Any]]] = {}  # by bits
    for group in (config.get("config_groups") or {}).values():
        form = group.get("format") or config.get("format")
        if form not in ("pack-quantized", "int-quantized", "naive-quantized"):
            raise _refused(file, f"compressed-tensors format {form!r}")
        if weights := group.get("weights"):
            check_fields(weights, Weights, file, sparse=False)
            bits, kind, strategy = weights["num_bits"], weights.get("type", "int"), weights.get("strategy")
            schemes.setdefault(bits, []).append(weights)
            if kind != "int" or bits not in (4, 8) or strategy not in (None, "tensor", "channel", "group"):
                raise _refused(file, f"compressed-tensors weights of {bits} bits, type {kind!r}, strategy {strategy!r}")
        if activations := group.get("input_activations"):
            if not activations.get("dynamic"):
                raise _refused(file, "compressed-tensors with static scales of activations (input_activations)")
            logger.warning("%s: activations are not quantised here; the weights are used as stored", file)
    read = functools.partial(_from_packed, schemes)
    stored = _join(stored, "weight_packed", (*packing.NAMES, "weight_g_idx"), read)
    return _join(stored, "weight", ("weight", "weight_scale", "weight_zero_point"), _from_values)


def _from_packed(
    schemes: Mapping[int, list[dict[str, Any]]], parts: Mapping[str, StoredTensor]
) -> tuple[tuple[int, int], Callable[[], Made]]:
    """schemes: how weights are quantised, by their bits. A weight must have what all schemes of its bits have in
    common."""
    shape = _shape_of(parts["weight_shape"])
    words = parts["weight_packed"]
    bits = packing.bits_of(words.shape, shape)
    if bits is None or words.dtype != torch.int32:
        raise QuantisationError(
            f"weight_packed {words.dtype} {list(words.shape)} does not hold {list(shape)} in 4 or 8 bits"
        )
    said = schemes.get(bits, [])
    sizes = {each.get("group_size") if each.get("strategy") == "group" else None for each in said}
    group = sizes.pop() if len(sizes) == 1 else None
    if group is not None and group > 0 and shape[1] != group * (groups := parts["weight_scale"].shape[-1]):
        raise QuantisationError(f"{groups} groups of {group} (group_size) do not make rows of {shape[1]}")
    if "weight_zero_point" not in parts and {each.get("symmetric", True) for each in said} == {False}:
        raise QuantisationError("it has no 'weight_zero_point'; the file is damaged")

    def load() -> Made:
        weight = packing.unpacked({n: p.load() for n, p in parts.items() if n in packing.NAMES}, shape)
        return _ordered(weight, parts["weight_g_idx"].load() if "weight_g_idx" in parts else None)

    return shape, load


def _from_values(parts: Mapping[str, StoredTensor]) -> tuple[tuple[int, int], Callable[[], Made]]:
    values, scale = parts["weight"], parts["weight_scale"]
    if len(values.shape) != 2 or scale.shape[:1] not in ((1,), values.shape[:1]):
        raise QuantisationError(f"weight {list(values.shape)} and weight_scale {list(scale.shape)} do not match")

    def load() -> Made:
        if "weight_zero_point" in parts and parts["weight_zero_point"].load().any():
            raise QuantisationError("8-bit weights with zero points are not supported: int8 weights are symmetric")
        step = scale.load().float().reshape(scale.shape[0], -1).expand(values.shape[0], -1).contiguous()
        return QuantisedWeight("int8", step, values=values.load().contiguous()), None

    return (values.shape[0], values.shape[1]), load


_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position of column c of eight in an AWQ word, which stores columns 0, 2, 4, 6, 1, 3, 5, 7."""


def _awq(stored: Mapping[str, StoredTensor], config: dict, file: Path) -> dict[str, StoredTensor]:
    check_fields(config, Packed, file)
    if config.get("bits", 4) != 4 or str(config.get("version", "gemm")).lower() != "gemm":
        raise _refused(file, f"AWQ of {config.get('bits', 4)} bits, version {config.get('version')!r}")
    return _join(stored, "qweight", ("qweight", "qzeros", "scales"), _from_awq)


def _from_awq(parts: Mapping[str, StoredTensor]) -> tuple[tuple[int, int], Callable[[], Made]]:
    columns, words = _matrix(parts["qweight"])
    out = 8 * words
    _check_shapes(parts, {"qzeros": (None, words), "scales": (None, out)})

    def load() -> Made:
        codes, zero = (_awq_codes(parts[name].load()) for name in ("qweight", "qzeros"))
        return packing.weight_of(4, pack(codes.T), parts["scales"].load().T, zero.T), None

    return (out, columns), load


def _awq_codes(words: Tensor) -> Tensor:
    nibbles = unpack(packing.bytes_of(words))
    return nibbles.unflatten(1, (-1, 8))[..., _AWQ_COLUMNS].flatten(1)


def _gptq(stored: Mapping[str, StoredTensor], config: dict, file: Path) -> dict[str, StoredTensor]:
    check_fields(config, Packed, file)
    bits, form = config.get("bits", 4), config.get("checkpoint_format", "gptq")
    if bits not in (4, 8) or form not in ("gptq", "gptq_v2"):
        raise _refused(file, f"GPTQ of {bits} bits, checkpoint_format {form!r}")
    make = functools.partial(_from_gptq, bits, 1 if form == "gptq" else 0)
    return _join(stored, "qweight", ("qweight", "qzeros", "scales", "g_idx"), make)


def _from_gptq(bits: int, less: int, parts: Mapping[str, StoredTensor]) -> tuple[tuple[int, int], Callable[[], Made]]:
    rows, out = _matrix(parts["qweight"])
    columns = rows * 32 // bits
    _check_shapes(parts, {"qzeros": (None, out * bits // 32), "scales": (None, out), "g_idx": (columns,)})

    def load() -> Made:
        codes = packing.bytes_of(parts["qweight"].load().T)
        zero = packing.bytes_of(parts["qzeros"].load())
        zero = (unpack(zero) if bits == 4 else zero) + less & (2**bits - 1)
        made = packing.weight_of(bits, codes, parts["scales"].load().T, zero.T)
        return _ordered(made, parts["g_idx"].load() if "g_idx" in parts else None)

    return (out, columns), load


def _torchao(stored: Mapping[str, StoredTensor], config: dict, file: Path) -> dict[str, StoredTensor]:
    return _join(stored, "_weight_qdata", ("_weight_qdata", "_weight_scale", "_weight_zero_point"), _from_torchao)


def _from_torchao(parts: Mapping[str, StoredTensor]) -> tuple[tuple[int, int], Callable[[], Made]]:
    """Int8Tensor and IntxUnpackedToInt8Tensor, with one byte per code. Packed types have another shape or dtype."""
    values, scale = parts["_weight_qdata"], parts["_weight_scale"]
    if values.dtype != torch.int8 or len(values.shape) != 2 or scale.shape[:1] not in ((1,), values.shape[:1]):
        raise QuantisationError(
            f"torchao's weight {values.dtype} {list(values.shape)} with scale {list(scale.shape)} is not supported: "
            "only int8 codes of one byte each are"
        )

    def load() -> Made:
        if "_weight_zero_point" in parts and parts["_weight_zero_point"].load().any():
            raise QuantisationError("torchao's weights with zero points are not supported")
        return packing.weight_of(8, values.load().view(torch.uint8) ^ 128, scale.load()), None

    return (values.shape[0], values.shape[1]), load


def _ordered(weight: QuantisedWeight, group_of: Tensor | None) -> Made:
    """The weight with its columns sorted by group, and their order; None if they are sorted already."""
    columns, groups = weight.shape[1], weight.scale.shape[1]
    if group_of is None or (group_of.numel() and bool((group_of == -1).all())):  # -1 everywhere: unset
        return weight, None
    group_of = group_of.long()
    if group_of.shape != (columns,) or (columns and int(group_of.min()) < 0):
        raise QuantisationError(f"g_idx {list(group_of.shape)} does not give each of {columns} columns a group")
    # Groups that packing.weight_of has split: compare with the sizes before the split.
    cuts = max(1, groups // (int(group_of.max()) + 1)) if len(group_of) else 1
    if torch.equal(group_of, torch.arange(columns, device=group_of.device) // (weight.group * cuts)):
        return weight, None
    order = group_of.argsort(stable=True)
    if not torch.equal(group_of[order], torch.arange(columns, device=group_of.device) // (weight.group * cuts)):
        raise QuantisationError(f"g_idx does not put {weight.group * cuts} columns into each of its groups")
    int8 = weight.scheme == "int8"
    codes = (weight.codes if int8 else unpack(weight.codes))[:, order].contiguous()
    return QuantisedWeight.unchecked(codes if int8 else pack(codes), weight.scale, weight.zero), order


_SCALES = ("weight_scale", "scales", "_weight_scale")


def _join(
    stored: Mapping[str, StoredTensor],
    main: str,
    names: tuple[str, ...],
    make: Callable[[Mapping[str, StoredTensor]], tuple[tuple[int, int], Callable[[], Made]]],
) -> dict[str, StoredTensor]:
    """Replace the tensors `names` of every module that has a tensor `main` by one entry MODULE.weight; `make` gives its
    shape and loader. Raises CheckpointError for a module that lacks one of them, or that has its weight twice."""
    left = dict(stored)
    for key, tensor in stored.items():
        module, _, leaf = key.rpartition(".")
        if leaf != main or (main == "weight" and tensor.dtype != torch.int8):
            continue
        parts = {name: left.pop(f"{module}.{name}") for name in names if f"{module}.{name}" in left}
        needed = {*_SCALES, "weight_shape", "qzeros"} & set(names)
        if lacking := sorted(needed - parts.keys()):
            raise CheckpointError(f"{tensor.file}: {key!r} has no {lacking[0]!r}; the file is damaged")
        if f"{module}.weight" in left:
            raise CheckpointError(f"{tensor.file}: {module!r} has {leaf!r} and 'weight' too; the file is damaged")
        scale = next(parts[name] for name in _SCALES if name in parts)
        try:
            shape, load = make(parts)
        except QuantisationError as problem:
            raise CheckpointError(f"{tensor.file}: {key!r}: {problem}") from None
        named = functools.partial(_named, tensor, load)
        dense = functools.partial(_dense, named, scale.dtype)
        scales = max(math.prod(scale.shape), shape[0])  # one scale for the tensor becomes one for each row
        zeros = scales if {"qzeros", "weight_zero_point"} & parts.keys() else 0
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize + 4 * scales + zeros
        left[f"{module}.weight"] = StoredQuantised(tensor.file, key, shape, scale.dtype, dense, named, nbytes)
    return left


def _named(tensor: StoredTensor, load: Callable[[], Made]) -> Made:
    try:
        return load()
    except QuantisationError as problem:
        raise CheckpointError(f"{tensor.file}: {tensor.key!r}: {problem}") from None


def _dense(load: Callable[[], Made], dtype: torch.dtype) -> Tensor:
    weight, order = load()
    made = dequantise(weight, dtype)
    return made if order is None else made[:, order.argsort()]


def _shape_of(tensor: StoredTensor) -> tuple[int, int]:
    if tensor.shape != (2,) or tensor.dtype not in (torch.int64, torch.int32):
        raise QuantisationError(f"weight_shape is {tensor.dtype} {list(tensor.shape)}, not two numbers")
    out, columns = tensor.load().tolist()
    return out, columns


def _matrix(tensor: StoredTensor) -> tuple[int, int]:
    if len(tensor.shape) != 2 or tensor.dtype != torch.int32:
        raise QuantisationError(f"it is {tensor.dtype} {list(tensor.shape)}, not an int32 matrix")
    return tensor.shape[0], tensor.shape[1]


def _check_shapes(parts: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int | None, ...]]) -> None:
    """Check the shapes of the parts that are present; None stands for any size, the same in all."""
    free = set()
    for name, shape in wanted.items():
        if name in parts:
            found = parts[name].shape
            if len(found) != len(shape) or any(w not in (None, f) for w, f in zip(shape, found, strict=True)):
                raise QuantisationError(f"{name} {list(found)} does not match it: one of them is truncated")
            free |= {f for w, f in zip(shape, found, strict=True) if w is None}
    if len(free) > 1:
        raise QuantisationError(f"{' and '.join(wanted)} have different numbers of groups: {sorted(free)}")


def _refused(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what} is not supported; load the unquantised checkpoint it was made from")


_READERS = {"compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "torchao": _torchao}
