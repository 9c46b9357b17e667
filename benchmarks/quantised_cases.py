"""Products with quantised weights at the size of a decoder's down projection: decoding steps of one, four and 16
sequences for 1, 5 and 40 tiles, and a prompt with so many tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op_case import OpCase, Widths, first_gradient
from llava_fast import ops
from llava_fast.ops.quantised_linear import QuantisedWeight, dequantise

TEXT = 64
SEQUENCES = {1: 1, 5: 4, 40: 16}  # tiles -> rows of a decoding step


def quantised_weight(
    out: int, columns: int, scheme: str, group: int | None, zeros: bool, device: torch.device
) -> QuantisedWeight:
    """Random codes, scales and zero points."""
    groups = columns // group if group else 1
    scale = (1 + torch.rand(out, groups, device=device)) / columns**0.5 / (64 if scheme == "int8" else 4)
    if scheme == "int8":
        codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device=device)
        return QuantisedWeight.unchecked(codes, scale)
    codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=device)
    zero = torch.randint(4, 12, (out, groups), dtype=torch.uint8, device=device) if zeros else None
    return QuantisedWeight.unchecked(codes, scale, zero)


def _product(
    rows: int,
    scheme: str,
    group: int | None,
    zeros: bool,
    dtype: torch.dtype,
    device: torch.device,
    widths: Widths,
) -> tuple[Tensor, QuantisedWeight, Tensor]:
    """(x, the weight, the weight in `dtype`)."""
    columns = max(widths.decoder * 43 // 16 // 128, 1) * 128
    weight = quantised_weight(widths.decoder, columns, scheme, group, zeros, device)
    return torch.randn(rows, columns, dtype=dtype, device=device), weight, dequantise(weight, dtype)


def _decoding(
    name: str,
    scheme: str,
    group: int | None,
    zeros: bool,
    tiles: int,
    dtype: torch.dtype,
    device: torch.device,
    widths: Widths,
) -> OpCase:
    """plain is the product with the weight in `dtype`, which reads two to four times the bytes."""
    rows = SEQUENCES.get(tiles, 1)
    x, weight, dense = _product(rows, scheme, group, zeros, dtype, device, widths)
    out, columns = weight.shape
    alone = rows == 1 or dtype == torch.float32
    return OpCase(
        f"quantised_linear_{name}",
        f"{rows} row{'' if rows == 1 else 's'}",
        rows,
        2 * rows * out * columns,
        weight.nbytes + rows * (out + columns) * dtype.itemsize,
        ("quantised_row_kernel" if alone else "quantised_rows_kernel",),
        lambda: ops.quantised_linear(x, weight),
        lambda: F.linear(x, dense),
        lambda: ops.quantised_linear(x.double(), weight),
    )


def quantised_int8(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """int8 with one scale for each row of the weight."""
    return _decoding("int8", "int8", None, False, tiles, dtype, device, widths)


def quantised_int4(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """int4 in groups of 32."""
    return _decoding("int4", "int4", 32, False, tiles, dtype, device, widths)


def quantised_int4_zeros(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """int4 in groups of 128 with zero points."""
    return _decoding("int4_zeros", "int4", 128, True, tiles, dtype, device, widths)


def quantised_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes over a prompt's rows in int4; what is compared is the gradient of x."""
    rows = tiles * (widths.tile // widths.patch) ** 2 + TEXT
    x, weight, dense = _product(rows, "int4", 32, False, dtype, device, widths)
    out, columns = weight.shape
    grad = torch.randn(rows, out, dtype=dtype, device=device)

    def run(x: Tensor) -> Tensor:
        return ops.quantised_linear(x, weight)

    return OpCase(
        "quantised_linear_backward",
        f"{tiles} tiles",
        rows,
        4 * rows * out * columns,
        2 * weight.nbytes + 2 * rows * (out + columns) * dtype.itemsize,
        ("dequantise_kernel",),
        lambda: first_gradient(run, [x], [grad]),
        lambda: first_gradient(lambda x: F.linear(x, dense), [x], [grad]),
        lambda: first_gradient(run, [x.double()], [grad.double()]),
    )


QUANTISED_CASES = (quantised_int8, quantised_int4, quantised_int4_zeros, quantised_gradients)
