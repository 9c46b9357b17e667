"""Native products with int8 and int4 weights: their rounding bound, the same bits everywhere, and when they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast import _C
from llava_fast.ops import QuantisedWeight, quantised_linear, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.quantised_linear import dequantise, native, quantise
from tests.support.rounded_rows import emulated, emulation_error, rounding_error

KINDS = {
    "int8": ("int8", None, True),
    "int8 32": ("int8", 32, True),
    "int8 64": ("int8", 64, True),
    "int8 128": ("int8", 128, True),
    "int4 32": ("int4", 32, True),
    "int4 64": ("int4", 64, True),
    "int4 128": ("int4", 128, True),
    "int4 32 zeros": ("int4", 32, False),
    "int4 64 zeros": ("int4", 64, False),
    "int4 128 zeros": ("int4", 128, False),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)
LEVELS = _C.simd_levels()


def columns_of(kind: str, odd: bool) -> int:
    """Three groups of 128, or sizes that end within one of the 64 or 128 elements that kernels take at a time."""
    if not odd:
        return 384
    return {
        "int8": 77,
        "int8 32": 96,
        "int8 64": 192,
        "int4 32": 224,
        "int4 32 zeros": 160,
        "int4 64": 192,
        "int4 64 zeros": 320,
    }.get(kind, 384)


def operands(kind: str, rows: int, out: int = 75, odd: bool = False) -> tuple[Tensor, QuantisedWeight, Tensor]:
    torch.manual_seed(rows)
    weight = quantise(torch.randn(out, columns_of(kind, odd)) + 0.1, *KINDS[kind])
    return torch.randn(rows, weight.shape[1]) * torch.rand(rows, 1) * 9, weight, torch.randn(out)


@of_every_kind
@pytest.mark.parametrize("odd", [False, True], ids=["whole", "odd"])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_every_instruction_set_gives_the_same_bits_within_the_bound(kind, rows, odd, monkeypatch):
    x, weight, bias = operands(kind, rows, odd=odd)
    exact = F.linear(x.double(), dequantise(weight, torch.float64), bias.double())
    found = []
    for level in LEVELS:
        monkeypatch.setenv("LLAVA_FAST_SIMD", level)
        found.append(native.quantised_linear(x, weight, bias))
    assert ((found[0] - exact).abs() <= rounding_error(x, weight, bias)).all()
    assert ((found[0] - emulated(x, weight, bias)).abs() <= emulation_error(x, weight, bias)).all()
    assert all(torch.equal(other, found[0]) for other in found[1:])


@of_every_kind
@pytest.mark.parametrize("odd", [False, True], ids=["whole", "odd"])
@pytest.mark.parametrize("rows", [33, 523])
def test_many_rows_have_the_same_bits_within_the_bound(kind, rows, odd, monkeypatch):
    x, weight, bias = operands(kind, rows, odd=odd)
    exact = F.linear(x.double(), dequantise(weight, torch.float64), bias.double())
    found = []
    for level in LEVELS:
        monkeypatch.setenv("LLAVA_FAST_SIMD", level)
        found.append(native.quantised_linear(x, weight, bias))
    group = 128 if weight.scale.shape[1] == 1 else weight.group
    assert ((found[0] - exact).abs() <= rounding_error(x, weight, bias, group)).all()
    assert ((found[0] - emulated(x, weight, bias, group)).abs() <= emulation_error(x, weight, bias, group)).all()
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert torch.equal(native.quantised_linear(x[:40], weight, bias)[:33], found[0][:33])


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 5])
def test_few_long_rows_with_zero_points(group, rows, monkeypatch):
    """More groups than are read at once: 69, 35 and 18."""
    torch.manual_seed(0)
    columns = {32: 2208, 64: 2240, 128: 2304}[group]
    weight, bias = quantise(torch.randn(70, columns) + 0.5, "int4", group, symmetric=False), torch.randn(70)
    x = torch.randn(rows, columns)
    exact = F.linear(x.double(), dequantise(weight, torch.float64), bias.double())
    for level in LEVELS:
        monkeypatch.setenv("LLAVA_FAST_SIMD", level)
        found = native.quantised_linear(x, weight, bias)
        assert ((found - exact).abs() <= rounding_error(x, weight, bias)).all()


def test_many_rows_over_blocks_of_columns_and_of_rows(monkeypatch):
    torch.manual_seed(0)
    weight, bias = quantise(torch.randn(203, 2208), "int4", 32, symmetric=False), torch.randn(203)
    x = torch.randn(40, 2208)
    exact = F.linear(x.double(), dequantise(weight, torch.float64), bias.double())
    found = native.quantised_linear(x, weight, bias)
    assert ((found - exact).abs() <= rounding_error(x, weight, bias)).all()
    for level in LEVELS:
        monkeypatch.setenv("LLAVA_FAST_SIMD", level)
        assert torch.equal(native.quantised_linear(x, weight, bias), found)
    x[7, 2000] = torch.nan
    found = native.quantised_linear(x, weight, None)
    assert found[7].isnan().all()
    assert found[8:].isfinite().all()


@of_every_kind
def test_a_row_is_the_same_bits_alone_and_among_others(kind):
    x, weight, bias = operands(kind, 11)
    together = native.quantised_linear(x, weight, bias)
    assert all(torch.equal(native.quantised_linear(x[i : i + 1], weight, bias)[0], together[i]) for i in range(11))


@pytest.mark.parametrize("out", [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 66, 67])
def test_any_number_of_outputs(out):
    x, weight, bias = operands("int8", 2, out)
    exact = F.linear(x.double(), dequantise(weight, torch.float64), bias.double())
    assert ((native.quantised_linear(x, weight, bias) - exact).abs() <= rounding_error(x, weight, bias)).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 33])
def test_the_largest_codes_do_not_saturate(rows, level, monkeypatch):
    """Sums of products in 16 bits would: the results are integers that float32 holds."""
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    x = torch.full((rows, 128), 127.0)
    for code in (-128, -127, 127):
        weight = QuantisedWeight("int8", torch.ones(4, 1), values=torch.full((4, 128), code, dtype=torch.int8))
        assert native.quantised_linear(x, weight, None).tolist() == [[127 * 128 * code] * 4] * rows
        assert native.quantised_linear(-x, weight, None).tolist() == [[-127 * 128 * code] * 4] * rows
    for code, zero in ((0xFF, 0), (0x00, 15)):
        packed, zeros = torch.full((4, 64), code, dtype=torch.uint8), torch.full((4, 1), zero, dtype=torch.uint8)
        weight = QuantisedWeight("int4", torch.ones(4, 1), packed=packed, zero=zeros)
        found = 127 * 128 * ((code & 15) - zero)
        assert native.quantised_linear(x, weight, None).tolist() == [[found] * 4] * rows
        assert native.quantised_linear(-x, weight, None).tolist() == [[-found] * 4] * rows


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_a_number_stays_so_and_zeros_are_zeros(level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    _, weight, _ = operands("int4 32", 1)
    x = torch.randn(5, 384)
    x[1] = 0
    x[2] = 1e-44
    x[3, 40] = torch.nan
    x[4, 300] = torch.inf
    found = native.quantised_linear(x, weight, None)
    assert found[0].isfinite().all()
    assert not found[1:3].any()
    assert found[3:].isnan().all()


@pytest.mark.parametrize("rows", [2, 37])
def test_threads_do_not_change_a_bit(rows):
    torch.manual_seed(0)
    weight = QuantisedWeight("int8", torch.rand(4099, 1), values=torch.randint(-127, 128, (4099, 2080)).to(torch.int8))
    x, here = torch.randn(rows, 2080), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.quantised_linear(x, weight, None)
        torch.set_num_threads(2)
        assert torch.equal(native.quantised_linear(x, weight, None), alone)
    finally:
        torch.set_num_threads(here)


def test_bfloat16_in_and_out():
    x, weight, bias = operands("int4 32", 3)
    wide = native.quantised_linear(x.bfloat16().float(), weight, bias.bfloat16().float())
    assert torch.equal(quantised_linear(x.bfloat16(), weight, bias.bfloat16()), wide.bfloat16())


def test_when_the_native_form_runs(monkeypatch):
    x, weight, bias = operands("int4 32", 3)
    fast = native.quantised_linear(x, weight, bias)
    with use_backend("reference"):
        exact = quantised_linear(x, weight, bias)
    assert not torch.equal(fast, exact)
    assert torch.equal(quantised_linear(x, weight, bias), fast)
    assert torch.equal(quantised_linear(x.requires_grad_(), weight, bias), exact)
    with torch.no_grad():
        assert torch.equal(quantised_linear(x, weight, bias), fast)
    many = torch.randn(native.MAX_ROWS + 1, 384)
    assert torch.equal(quantised_linear(many, weight), native.quantised_linear(many, weight, None)) == _C.fast_product()
    monkeypatch.setenv("LLAVA_FAST_SIMD", "scalar")
    with use_backend("native"):
        with pytest.raises(BackendError, match="it rounds its inputs and has no gradients"):
            quantised_linear(x, weight, bias)
        with pytest.raises(BackendError, match="it takes more than 32 rows only with AVX2, x has 33"):
            quantised_linear(many, weight)
        with pytest.raises(BackendError, match=r"x is torch\.float64"):
            quantised_linear(x.detach().double(), weight)
    assert quantised_linear(torch.randn(0, 384), weight).shape == (0, 75)
