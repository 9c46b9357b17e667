"""quantised_linear in Triton against float64: products of few rows from the codes, of many rows and gradients from the
dequantised weight, and when which runs."""

import pytest
import torch
from torch.nn import functional as F

from llava_fast.errors import BackendError
from llava_fast.ops import QuantisedWeight, quantised_linear, use_backend
from llava_fast.ops.quantised_linear import dequantise, quantise, triton_kernels
from llava_fast.ops.triton_support import forced
from tests.support.kernel_checks import DEVICE, DTYPES, TOLERANCE, check_op, relative

KINDS = {
    "int8": ("int8", None, True, 116),  # columns of one word less than two runs and more
    "int8 32": ("int8", 32, True, 96),
    "int8 128": ("int8", 128, True, 256),
    "int4 32": ("int4", 32, True, 224),
    "int4 64": ("int4", 64, True, 192),
    "int4 128": ("int4", 128, True, 256),
    "int4 32 zeros": ("int4", 32, False, 160),
    "int4 64 zeros": ("int4", 64, False, 192),
    "int4 128 zeros": ("int4", 128, False, 256),
    "int4 one group": ("int4", 128, True, 128),
    "int4 one group, zeros": ("int4", 128, False, 128),
}
SMALL = {"BLOCK_N": 16, "RUNS": 2, "num_warps": 1}
CONFIGS = {
    "quantised_row_kernel": SMALL,
    "quantised_rows_kernel": {**SMALL, "num_stages": 2},
    "dequantise_kernel": SMALL,
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)
of_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poisoned")


def weight_of(kind: str, out: int = 19) -> QuantisedWeight:
    scheme, group, symmetric, columns = KINDS[kind]
    dense = torch.randn(out, columns) + 0.3
    dense[3] = 0  # a row without a scale of its own
    weight = quantise(dense, scheme, group, symmetric)
    weight.scale.mul_(1 + 1e-3 * torch.rand_like(weight.scale))  # no values of 16 bits
    return weight.to(DEVICE)


def run(x, codes, scale, zero, bias):
    return quantised_linear(x, QuantisedWeight.unchecked(codes, scale, zero), bias)


def check(x, weight, bias, trained=()):
    check_op(run, [x, weight.codes, weight.scale, weight.zero, bias], list(trained), "triton")


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run."""
    names = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        @property
        def __name__(self):
            return self.kernel.__name__

        def __getitem__(self, grid):
            names.append(self.kernel.__name__)
            return self.kernel[grid]

    for name in CONFIGS:
        monkeypatch.setattr(triton_kernels, name, Noted(getattr(triton_kernels, name)))
    monkeypatch.setattr(triton_kernels.sums, "sum_shares_kernel", Noted(triton_kernels.sums.sum_shares_kernel))
    return names


@of_every_kind
@of_every_dtype
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows(kind, dtype, rows, launched, monkeypatch):
    """Whole, and with the columns split among programs. x is every second row of another tensor."""
    weight = weight_of(kind)
    x = torch.randn(rows, 2, weight.shape[1], dtype=dtype, device=DEVICE)[:, 1]
    bias = torch.randn(19, dtype=dtype, device=DEVICE)
    kernel = "quantised_row_kernel" if rows == 1 or dtype == torch.float32 else "quantised_rows_kernel"
    with forced(CONFIGS):
        check(x, weight, bias)
        monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
        check(x, weight, None)
    assert launched == [kernel, "sum_shares_kernel", kernel]


@of_every_kind
@of_every_dtype
def test_many_rows_and_gradients(kind, dtype, launched):
    weight = weight_of(kind)
    x = torch.randn(3, 7, weight.shape[1], dtype=dtype, device=DEVICE)
    bias = torch.randn(19, dtype=dtype, device=DEVICE)
    with forced(CONFIGS):
        check(x, weight, bias, trained=(0, 4))
    assert launched == ["dequantise_kernel"] * 2


@of_every_kind
@of_every_dtype
def test_a_weight_is_dequantised_with_one_rounding(kind, dtype):
    weight = weight_of(kind)
    with forced(CONFIGS):
        assert torch.equal(triton_kernels.dequantise(weight, dtype), dequantise(weight, dtype))


def test_gradients_of_one_row_and_of_the_bias_alone():
    weight = weight_of("int4 32")
    x = torch.randn(1, weight.shape[1], device=DEVICE, requires_grad=True)
    bias = torch.randn(19, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        found = torch.autograd.grad(quantised_linear(x, weight, bias).sum(), (x, bias))
        (of_bias,) = torch.autograd.grad(quantised_linear(x.detach(), weight, bias).sum(), bias)
    assert relative(found[0], dequantise(weight, torch.float64).sum(0, keepdim=True)) < TOLERANCE[torch.float32]
    assert torch.equal(found[1], torch.ones_like(bias))
    assert torch.equal(of_bias, torch.ones_like(bias))


@pytest.mark.parametrize("rows", [0, 16, 17])
def test_the_shipped_configurations(rows):
    weight = weight_of("int4 128 zeros", out=70)
    x = torch.randn(rows, 256, dtype=torch.float16, device=DEVICE)
    with use_backend("triton"):
        found = quantised_linear(x, weight)
    assert relative(found, F.linear(x.double(), dequantise(weight, torch.float64))) < TOLERANCE[torch.float16]


def test_a_row_of_its_own_has_the_bits_of_a_row_among_others_in_float32():
    weight = weight_of("int4 64 zeros")
    x = torch.randn(4, weight.shape[1], device=DEVICE)
    with use_backend("triton"):
        together = quantised_linear(x, weight)
        assert all(torch.equal(quantised_linear(x[i : i + 1], weight)[0], together[i]) for i in range(4))


def test_extreme_codes_are_exact():
    """Sums of whole numbers, in every place of a word."""
    x = torch.randint(-8, 9, (2, 64), device=DEVICE).half()
    packed = torch.randint(0, 256, (20, 32), dtype=torch.uint8, device=DEVICE)
    packed[0], packed[1] = 0, 255
    zero = torch.randint(0, 16, (20, 2), dtype=torch.uint8, device=DEVICE)
    values = torch.randint(-128, 128, (20, 64), device=DEVICE).to(torch.int8)
    values[0], values[1] = -128, 127
    ones = torch.ones(20, 2, device=DEVICE)
    for weight in (
        QuantisedWeight("int4", ones, packed=packed, zero=zero),
        QuantisedWeight("int8", ones, values=values),
        QuantisedWeight("int8", ones[:, :1].contiguous(), values=values),
    ):
        exact = F.linear(x.double(), dequantise(weight, torch.float64))
        with use_backend("triton"):
            for rows in (1, 2):
                assert torch.equal(quantised_linear(x[:rows], weight), exact[:rows].half())


def test_what_it_does_not_support_says_why():
    weight = quantise(torch.randn(8, 77), "int8").to(DEVICE)
    with use_backend("triton"), pytest.raises(BackendError, match="32-bit words, a row of the weight has 77 bytes"):
        quantised_linear(torch.randn(2, 77, device=DEVICE), weight)
    with use_backend("triton"), pytest.raises(BackendError, match=r"torch\.float64 is not one of its dtypes"):
        quantised_linear(torch.randn(2, 96, dtype=torch.float64, device=DEVICE), weight_of("int8 32"))
