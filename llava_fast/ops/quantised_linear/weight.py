"""The storage of a quantised weight: codes, scales and zero points, validated when the object is created.

int8: `values` int8 [out, in], w = value * scale. int4: `packed` uint8 [out, in / 2]; byte j holds element 2j in its low
nibble and 2j + 1 in its high one, unsigned 0..15; w = (code - zero) * scale, with zero = 8 if it is None. The bytes of
`packed` equal those of compressed-tensors' int32 `weight_packed` on a little-endian machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from llava_fast.errors import QuantisationError

SCHEMES = ("int8", "int4")
GROUPS = (32, 64, 128)
"""Supported group sizes: elements of a row that share a scale (for int8 also the whole row)."""
BLOCK_VALUES = 1 << 20
"""Most values of a weight that are dequantised at once: 4 MiB in float32."""


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight [out, in] in one of SCHEMES. Codes, scales and zero points are contiguous and on one device.

    scheme  "int8" or "int4".
    scale   float32 [out, groups], finite and positive; group g scales elements g * group to (g + 1) * group of a row.
    values  int8 only: int8 [out, in]; 1 group (one scale per row) or groups of 32, 64 or 128.
    packed  int4 only: uint8 [out, in / 2]; groups of 32, 64 or 128.
    zero    int4 only: uint8 [out, groups], 0..15; None stands for 8 everywhere (symmetric).

    Raises QuantisationError for mismatched tensors and invalid values. Values are not checked on the meta device.
    """

    scheme: str
    scale: Tensor
    values: Tensor | None = None
    packed: Tensor | None = None
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        _check_layout(self)
        _check_values(self)

    @classmethod
    def unchecked(cls, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> QuantisedWeight:
        """A weight from tensors that were validated before, without checks. The codes' dtype decides the scheme."""
        made = object.__new__(cls)
        int8 = codes.dtype == torch.int8
        parts = {"values": codes if int8 else None, "packed": None if int8 else codes, "scale": scale, "zero": zero}
        for name, value in {"scheme": "int8" if int8 else "int4", **parts}.items():
            object.__setattr__(made, name, value)
        return made

    @property
    def codes(self) -> Tensor:
        """`values` (int8) or `packed` (int4)."""
        return self.values if self.scheme == "int8" else self.packed  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, stored = self.codes.shape
        return out, stored if self.scheme == "int8" else 2 * stored

    @property
    def group(self) -> int:
        """Number of elements of a row that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scale, self.zero) if part is not None)

    def to(self, device: torch.device | str) -> QuantisedWeight:
        """On another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return QuantisedWeight.unchecked(self.codes.to(device), self.scale.to(device), zero)

    def rows(self, rows: slice) -> QuantisedWeight:
        """A slice of the weight's rows, as views."""
        zero = None if self.zero is None else self.zero[rows]
        return QuantisedWeight.unchecked(self.codes[rows], self.scale[rows], zero)

    def blocks(self) -> Iterator[slice]:
        """Slices of rows with at most BLOCK_VALUES values each, but at least one row."""
        yield from row_blocks(*self.shape)


def row_blocks(rows: int, columns: int, values: int | None = None) -> Iterator[slice]:
    """Slices that cover `rows`, with at most `values` (default: BLOCK_VALUES) values each, but at least one row."""
    step = max(1, (values or BLOCK_VALUES) // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def check_scheme(scheme: str, columns: int, group: int | None, symmetric: bool = True) -> int:
    """The group size of a weight with rows of `columns` values: `group`, or the whole row for int8 with None. Raises
    QuantisationError for an unsupported scheme, group or symmetry."""
    if scheme not in SCHEMES:
        raise QuantisationError(f"quantisation scheme {scheme!r} is unknown: use {' or '.join(map(repr, SCHEMES))}")
    if not columns:
        raise QuantisationError(f"{scheme}: the weight has no columns")
    if scheme == "int8" and not symmetric:
        raise QuantisationError("int8 weights are symmetric: zero points are for int4")
    if scheme == "int8" and group in (None, columns):
        return columns
    if group not in GROUPS:
        also = " or None" if scheme == "int8" else ""
        raise QuantisationError(
            f"{scheme}: group {group!r} is not supported: use {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}{also}"
        )
    if columns % group:
        raise QuantisationError(f"{scheme}: group {group} does not divide rows of {columns} values")
    return group


def _check_layout(weight: QuantisedWeight) -> None:
    scheme, codes = weight.scheme, {"values": weight.values, "packed": weight.packed}
    if scheme not in SCHEMES:
        raise QuantisationError(f"quantisation scheme {scheme!r} is unknown: use {' or '.join(map(repr, SCHEMES))}")
    own, other = ("values", "packed") if scheme == "int8" else ("packed", "values")
    stored = codes[own]
    if stored is None or codes[other] is not None:
        raise QuantisationError(f"{scheme} weights have {own!r} and no {other!r}")
    dtype = torch.int8 if scheme == "int8" else torch.uint8
    _check_matrix(f"{scheme}: {own}", stored, dtype)
    _check_matrix(f"{scheme}: scale", weight.scale, torch.float32)
    out, columns = weight.shape
    groups = weight.scale.shape[1]
    if weight.scale.shape[0] != out:
        raise QuantisationError(
            f"{scheme}: {own} {list(stored.shape)} has {out} rows and scale {list(weight.scale.shape)} "
            f"{weight.scale.shape[0]}: one of them is cut short"
        )
    if not groups or columns % groups:
        raise QuantisationError(
            f"{scheme}: {own} {list(stored.shape)} holds rows of {columns} values, which {groups} groups of scale "
            f"{list(weight.scale.shape)} do not divide: one of them is cut short"
        )
    check_scheme(scheme, columns, columns // groups)
    if weight.zero is not None:
        if scheme == "int8":
            raise QuantisationError("int8 weights are symmetric: zero points are for int4")
        _check_matrix("int4: zero", weight.zero, torch.uint8)
        if weight.zero.shape != weight.scale.shape:
            raise QuantisationError(
                f"int4: zero {list(weight.zero.shape)} and scale {list(weight.scale.shape)} must have one shape"
            )
    if len({part.device for part in (codes[own], weight.scale, weight.zero) if part is not None}) > 1:
        raise QuantisationError(f"{scheme}: {own}, scale and zero must be on one device")


def _check_matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise QuantisationError(f"{name} must be a {dtype} matrix, not {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise QuantisationError(f"{name} {list(tensor.shape)} must be contiguous")


def _check_values(weight: QuantisedWeight) -> None:
    if weight.scale.is_meta or isinstance(weight.scale, FakeTensor):
        return
    good = torch.isfinite(weight.scale) & (weight.scale > 0)
    if not good.all():
        row, group = (~good).nonzero()[0].tolist()
        value = weight.scale[row, group].item()
        raise QuantisationError(
            f"{weight.scheme}: scale[{row}, {group}] is {value}: scales are finite and positive; the weight is damaged"
        )
    if weight.zero is not None and weight.zero.numel() and weight.zero.max() > 15:
        raise QuantisationError(f"int4: zero holds {weight.zero.max().item()}: zero points are 0 to 15")
