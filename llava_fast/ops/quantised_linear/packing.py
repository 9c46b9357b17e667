"""Quantised weights in compressed-tensors' format "pack-quantized", which transformers and vLLM read.

weight_packed      int32 [out, words]: codes from the lowest bit up, 8-bit codes stored as code + 128.
weight_scale       [out, groups].
weight_zero_point  int32 [words, groups], packed along the rows; absent if symmetric.
weight_shape       int64 (out, in).

Source: vllm-project/compressed-tensors 0.20 (compressors/pack_quantized). Words are little-endian, which the rest of
this package assumes too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.errors import QuantisationError
from llava_fast.ops.quantised_linear.reference import pack, unpack
from llava_fast.ops.quantised_linear.weight import GROUPS, QuantisedWeight

NAMES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def packed(weight: QuantisedWeight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A weight as a dict with keys NAMES. Scales are in `dtype` if it represents them exactly, else in float32."""
    words = _words(weight.codes if weight.scheme == "int4" else weight.codes.view(torch.uint8) ^ 128)
    scale = weight.scale.to(dtype)
    exact = scale.is_meta or torch.equal(scale.to(weight.scale.dtype), weight.scale)
    made = {
        "weight_packed": words,
        "weight_scale": scale if exact else weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zero is not None:
        made["weight_zero_point"] = _words(pack(F.pad(weight.zero.T, (0, -weight.shape[0] % 8)))).T.contiguous()
    return made


def unpacked(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantisedWeight:
    """The inverse of `packed`: a weight of `shape` in 8 or 4 bits, deduced from the tensors' sizes. Raises
    QuantisationError for tensors that do not match the shape."""
    out, columns = shape
    words, zero = stored["weight_packed"], stored.get("weight_zero_point")
    bits = bits_of(words.shape, shape)
    if words.dtype != torch.int32 or bits is None:
        raise QuantisationError(
            f"weight_packed {words.dtype} {list(words.shape)} does not hold {list(shape)} in 4 or 8 bits: it is cut "
            "short or of another format"
        )
    codes = bytes_of(words)[:, : columns * bits // 8]
    if zero is not None:
        groups = stored["weight_scale"].shape[-1]
        if zero.dtype != torch.int32 or zero.shape != (-(-out * bits // 32), groups):
            raise QuantisationError(
                f"weight_zero_point {zero.dtype} {list(zero.shape)} does not hold {out} x {groups} {bits}-bit values"
            )
        zero = bytes_of(zero.T)
        zero = (unpack(zero) if bits == 4 else zero)[:, :out].T
    return weight_of(bits, codes, stored["weight_scale"], zero)


def bits_of(words: tuple[int, ...], shape: tuple[int, int]) -> int | None:
    """Bits per code, 4 or 8, given the shape `words` of the int32 words; None if neither fits."""
    fits = len(words) == 2 and words[0] == shape[0]
    return next((bits for bits in (4, 8) if fits and words[1] == -(-shape[1] * bits // 32)), None)


def weight_of(bits: int, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> QuantisedWeight:
    """A QuantisedWeight from unsigned codes: uint8 [out, in] for 8 bits, [out, in / 2] for 4; scale [out, groups],
    [out] or one value, in any floating dtype; unsigned zero points [out, groups], None for symmetric.

    Groups larger than the supported sizes are split into supported ones. Raises QuantisationError for other group sizes
    and for 8 bits with zero points other than 128.
    """
    if scale.numel() == 1:
        scale = scale.reshape(1).expand(len(codes))
    if scale.dim() not in (1, 2) or len(scale) != len(codes):
        raise QuantisationError(f"scale {list(scale.shape)} does not fit a weight of {len(codes)} rows")
    scale = scale.reshape(len(codes), -1).float()
    columns = codes.shape[1] * 8 // bits
    cuts = 1
    if scale.shape[1] and columns % scale.shape[1] == 0 and not (bits == 8 and scale.shape[1] == 1):
        group = columns // scale.shape[1]
        cuts = next((group // size for size in (group, *reversed(GROUPS)) if size in GROUPS and group % size == 0), 1)
    scale = scale.repeat_interleave(cuts, 1).contiguous()
    if bits == 8:
        if zero is not None and not (zero == 128).all():
            raise QuantisationError("8-bit weights with zero points are not supported: int8 weights are symmetric")
        return QuantisedWeight("int8", scale, values=(codes ^ 128).view(torch.int8).contiguous())
    if zero is not None:
        zero = None if (zero == 8).all() else zero.repeat_interleave(cuts, 1).contiguous()
    return QuantisedWeight("int4", scale, packed=codes.contiguous(), zero=zero)


def _words(codes: Tensor) -> Tensor:
    """Bytes [rows, n] as int32 [rows, ceil(n / 4)], zero-padded."""
    filled = F.pad(codes, (0, -codes.shape[1] % 4))
    return filled.reshape(-1).view(torch.int32).view(len(filled), -1)


def bytes_of(words: Tensor) -> Tensor:
    """int32 [rows, n] as bytes [rows, 4n]. (Flattened first, since a single row or column may have any strides.)"""
    return words.reshape(-1).view(torch.uint8).view(len(words), -1)
