"""quantised_linear: storage, rounding and gradients against float64, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from llava_fast.errors import QuantisationError
from llava_fast.ops import QuantisedWeight, quantised_linear
from llava_fast.ops.quantised_linear import dequantise, dequantise_rows, quantise, quantised_product, weight
from llava_fast.ops.quantised_linear.reference import pack, unpack
from tests.support.kernel_checks import TOLERANCE, relative

KINDS = {
    "int8": ("int8", None, True),
    "int8 groups": ("int8", 64, True),
    "int4": ("int4", 32, True),
    "int4 zeros": ("int4", 32, False),
    "int4 128": ("int4", 128, True),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every weight here is of several blocks of rows."""
    monkeypatch.setattr(weight, "BLOCK_VALUES", 1024)


def made(kind, out=37, columns=256, shift=0.3):
    torch.manual_seed(0)
    dense = torch.randn(out, columns) + shift
    dense[3] = 0  # a row without a scale of its own
    return dense, quantise(dense, *kind)


@of_every_kind
def test_no_weight_is_off_by_more_than_half_its_scale(kind):
    dense, quantised = made(kind)
    assert quantised.shape == (37, 256)
    assert quantised.group == (kind[1] or 256)
    error = (dequantise(quantised, torch.float64) - dense).abs().unflatten(1, (-1, quantised.group))
    assert (error <= quantised.scale.double().unsqueeze(-1) * (0.5 + 1e-6)).all()
    assert not dequantise(quantised)[3].any()


@of_every_kind
def test_what_is_quantised_again_is_the_same(kind):
    """Codes that a scheme can hold come back, scale and all, where they span its range."""
    _, first = made(kind)
    again = quantise(dequantise(first, torch.float64), *kind)
    torch.testing.assert_close(dequantise(again), dequantise(first), rtol=0.07, atol=0)


def test_the_low_nibble_holds_the_even_element():
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    assert pack(codes)[0].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert torch.equal(unpack(pack(codes)), codes)
    packed = torch.full((1, 16), 0x9F, dtype=torch.uint8)  # 15, 9, 15, 9...
    scale = torch.full((1, 1), 0.5)
    assert dequantise(QuantisedWeight("int4", scale, packed=packed))[0, :2].tolist() == [3.5, 0.5]
    zero = torch.full((1, 1), 15, dtype=torch.uint8)
    assert dequantise(QuantisedWeight("int4", scale, packed=packed, zero=zero))[0, :2].tolist() == [0, -3]


@of_every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_forward_and_gradients(kind, dtype):
    _, quantised = made(kind)
    x, bias = torch.randn(2, 5, 256, dtype=dtype, requires_grad=True), torch.randn(37, dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()]
    expected = F.linear(exact[0], dequantise(quantised, torch.float64), exact[1])
    found = quantised_linear(x, quantised, bias)
    grad = torch.randn_like(found)
    assert found.dtype == dtype
    assert relative(found, expected) <= TOLERANCE[dtype]
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for mine, other in zip(torch.autograd.grad(found, (x, bias), grad), theirs, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, other) <= TOLERANCE[dtype]


def test_the_backward_pass_keeps_no_input():
    _, quantised = made(KINDS["int4"])
    kept = []
    x = torch.randn(5, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantised_linear(x, quantised)
    assert sum(t.nbytes for t in kept) == quantised.nbytes


@of_every_kind
def test_the_operator(kind):
    _, quantised = made(kind, out=8)
    x, bias = torch.randn(3, 256, requires_grad=True), torch.randn(8, requires_grad=True)
    parts = (quantised.codes, quantised.scale, quantised.zero)
    torch.library.opcheck(torch.ops.llava_fast.quantised_linear.default, (x, *parts, bias, True))
    torch.library.opcheck(torch.ops.llava_fast.quantised_linear.default, (x[:0], *parts, None, False))


def test_autocast_and_compile():
    _, quantised = made(KINDS["int8"])
    x = torch.randn(5, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised_linear(x, quantised, torch.randn(37)).dtype == torch.bfloat16
    parts = (quantised.codes, quantised.scale, quantised.zero)
    compiled = torch.compile(lambda x: quantised_product(x, *parts), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), quantised_linear(x, quantised))


@of_every_kind
def test_rows_by_number(kind):
    _, quantised = made(kind)
    ids = torch.tensor([[5, 0], [36, 5]])
    assert torch.equal(dequantise_rows(quantised, ids), dequantise(quantised)[ids])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "fp8"}, "scheme 'fp8' is unknown: use 'int8' or 'int4'"),
        ({"scheme": "int4"}, "int4: group None is not supported: use 32, 64 or 128"),
        ({"scheme": "int4", "group": 48}, "int4: group 48 is not supported"),
        ({"scheme": "int8", "group": 16}, "int8: group 16 is not supported: use 32, 64 or 128 or None"),
        ({"scheme": "int4", "group": 128}, "int4: group 128 does not divide rows of 96 values"),
        ({"scheme": "int8", "symmetric": False}, "int8 weights are symmetric"),
        ({"scheme": "int8", "weight": torch.full((2, 96), float("nan"))}, "not finite"),
        ({"scheme": "int8", "weight": torch.ones(96)}, r"must be floating \[out, in\], not torch.float32 \[96\]"),
    ],
    ids=str,
)
def test_what_cannot_be_quantised_says_why(arguments, message):
    with pytest.raises(QuantisationError, match=message):
        quantise(**{"weight": torch.ones(2, 96), **arguments})


def parts(**changes):
    return {
        "scheme": "int4",
        "scale": torch.ones(4, 2),
        "packed": torch.zeros(4, 32, dtype=torch.uint8),
        "zero": torch.zeros(4, 2, dtype=torch.uint8),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int3"}, "scheme 'int3' is unknown"),
        ({"scheme": "int8"}, "int8 weights have 'values' and no 'packed'"),
        ({"packed": None}, "int4 weights have 'packed'"),
        ({"scale": torch.ones(4, 2).double()}, "scale must be a torch.float32 matrix, not torch.float64"),
        ({"packed": torch.zeros(4, 32)}, "packed must be a torch.uint8 matrix"),
        ({"packed": torch.zeros(3, 32, dtype=torch.uint8)}, r"\[3, 32\] has 3 rows and scale \[4, 2\] 4: one of"),
        ({"packed": torch.zeros(4, 31, dtype=torch.uint8)}, "int4: group 31 is not supported"),
        ({"packed": torch.zeros(4, 30, dtype=torch.uint8), "scale": torch.ones(4, 7)}, "7 groups .* do not divide"),
        ({"zero": torch.zeros(4, 1, dtype=torch.uint8)}, r"zero \[4, 1\] and scale \[4, 2\] must have one shape"),
        ({"zero": torch.full((4, 2), 16, dtype=torch.uint8)}, "zero holds 16: zero points are 0 to 15"),
        ({"scale": torch.tensor([[1, 1], [1, float("nan")], [1, 1], [1, 1]])}, r"scale\[1, 1\] is nan"),
        ({"scale": torch.tensor([[1, 0.0], [1, 1], [1, 1], [1, 1]])}, r"scale\[0, 1\] is 0.0: scales are"),
        ({"packed": torch.zeros(4, 0, dtype=torch.uint8)}, "the weight has no columns"),
        ({"scale": -torch.ones(4, 2)}, r"scale\[0, 0\] is -1.0"),
        ({"scale": torch.ones(2, 4).T}, "scale .* must be contiguous"),
        ({"scale": torch.ones(4, 2, device="meta")}, "must be on one device"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_say_why(changes, message):
    with pytest.raises(QuantisationError, match=message):
        QuantisedWeight(**parts(**changes))


def test_shapes_and_dtypes_of_a_call_are_checked():
    _, quantised = made(KINDS["int8"])
    with pytest.raises(ValueError, match=r"x \(2, 40\) torch.float32 must be floating \[.., in\]"):
        quantised_linear(torch.randn(2, 40), quantised)
    with pytest.raises(ValueError, match=r"bias \(5,\) must be \[37\]"):
        quantised_linear(torch.randn(2, 256), quantised, torch.randn(5))
    with pytest.raises(ValueError, match="codes is on meta and x on cpu: move them to one device"):
        quantised_linear(torch.randn(2, 256), quantised.to("meta"))
    with pytest.raises(ValueError, match=r"bias is torch\.float64 and x torch\.float32"):
        quantised_linear(torch.randn(2, 256), quantised, torch.randn(37).double())


def test_a_default_device_elsewhere_changes_nothing():
    """csrc gets memory of its own on the CPU."""
    _, quantised = made(KINDS["int8"])
    x = torch.randn(2, 256)
    expected = quantised_linear(x, quantised)
    with torch.device("meta"):
        assert torch.equal(quantised_linear(x, quantised), expected)
