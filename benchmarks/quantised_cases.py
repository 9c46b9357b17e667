"""Products with quantised weights of a decoder: of one row (down projection, up projection and attention's output for
1, 5 and 40 tiles), of 2, 4 and 16 rows, and of a prompt with so many tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.op_case import OpCase, Widths, first_gradient
from llava_fast import ops
from llava_fast.ops.quantised_linear import QuantisedWeight, dequantise

TEXT = 64
ROWS = {1: 2, 5: 4, 40: 16}  # tiles -> sequences of a decoding step


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
    shape: tuple[int, int],
    rows: int,
    scheme: tuple[str, int | None, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, QuantisedWeight, Tensor]:
    """(x, the weight, the weight in `dtype`)."""
    out, columns = shape[0], max(shape[1] // 128, 1) * 128
    weight = quantised_weight(out, columns, *scheme, device)
    return torch.randn(rows, columns, dtype=dtype, device=device), weight, dequantise(weight, dtype)


def _decoding(
    op: str,
    kernel: str,
    shape: tuple[int, int],
    rows: int,
    scheme: tuple[str, int | None, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> OpCase:
    """plain is the product with the weight in `dtype`, which reads two to four times the bytes."""
    x, weight, dense = _product(shape, rows, scheme, dtype, device)
    out, columns = weight.shape
    return OpCase(
        op,
        f"{rows} x {columns} to {out}",
        rows,
        2 * rows * out * columns,
        weight.nbytes + rows * (out + columns) * dtype.itemsize,
        (kernel,),
        lambda: ops.quantised_linear(x, weight),
        lambda: F.linear(x, dense),
        lambda: ops.quantised_linear(x.double(), weight),
    )


def _of_one_row(
    name: str,
    scheme: tuple[str, int | None, bool],
    tiles: int,
    dtype: torch.dtype,
    device: torch.device,
    widths: Widths,
) -> OpCase:
    narrow, wide = widths.decoder, widths.decoder * 43 // 16
    shape = {1: (narrow, wide), 5: (wide, narrow)}.get(tiles, (narrow, narrow))
    return _decoding(f"quantised_row_{name}", "quantised_row_kernel", shape, 1, scheme, dtype, device)


def quantised_row_int8(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """int8 with one scale for each row of the weight."""
    return _of_one_row("int8", ("int8", None, False), tiles, dtype, device, widths)


def quantised_row_int4(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """int4 in groups of 32."""
    return _of_one_row("int4", ("int4", 32, False), tiles, dtype, device, widths)


def quantised_row_int4_zeros(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """int4 in groups of 128 with zero points."""
    return _of_one_row("int4_zeros", ("int4", 128, True), tiles, dtype, device, widths)


def quantised_rows_int8(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    shape, rows = (widths.decoder, widths.decoder * 43 // 16), ROWS.get(tiles, 2)
    kernel = "quantised_rows_kernel"
    return _decoding("quantised_rows_int8", kernel, shape, rows, ("int8", None, False), dtype, device)


def quantised_rows_int4(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    shape, rows = (widths.decoder, widths.decoder * 43 // 16), ROWS.get(tiles, 2)
    return _decoding("quantised_rows_int4", "quantised_rows_kernel", shape, rows, ("int4", 32, False), dtype, device)


def quantised_gradients(tiles: int, dtype: torch.dtype, device: torch.device, widths: Widths) -> OpCase:
    """Both passes over a prompt's rows in int4; what is compared is the gradient of x."""
    rows = tiles * (widths.tile // widths.patch) ** 2 + TEXT
    shape = (widths.decoder, widths.decoder * 43 // 16)
    x, weight, dense = _product(shape, rows, ("int4", 32, False), dtype, device)
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


QUANTISED_CASES = (
    quantised_row_int8,
    quantised_row_int4,
    quantised_row_int4_zeros,
    quantised_rows_int8,
    quantised_rows_int4,
    quantised_gradients,
)
