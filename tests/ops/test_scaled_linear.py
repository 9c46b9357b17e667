"""Products of operands in 8 bits: rounding, the error's bound, what is refused, and what selection makes of them."""

import pytest
import torch

from llava_fast.errors import BackendError
from llava_fast.ops import backend, scaled_linear, use_backend
from llava_fast.ops.rounding import LARGEST, TYPICAL_ERROR, rounded_rows
from llava_fast.ops.scaled_linear import eight_bit
from llava_fast.ops.scaled_linear.reference import rounded_linear
from llava_fast.ops.selection import policy, samples, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODES = [dtype for dtype in LARGEST if eight_bit.unfit_device(torch.device(DEVICE), dtype) is None]
on_codes = pytest.mark.parametrize("codes", CODES, ids=str)


def drawn(codes, rows=300, columns=64, out=48, dtype=torch.float32, bias=True):
    """(x, weight, codes, scale, bias), values of one row a hundred times the others'."""
    x, weight = torch.randn(rows, columns, device=DEVICE), torch.randn(out, columns, device=DEVICE) / columns**0.5
    x[3] *= 100
    x, weight = x.to(dtype), weight.to(dtype)
    rounded = rounded_rows(weight, codes)
    return x, weight, *rounded, torch.randn(out, device=DEVICE).to(dtype) if bias else None


@on_codes
def test_rows_are_rounded_to_the_nearest_code(codes):
    x = torch.randn(50, 40, dtype=torch.float64)
    x[7], x[8] = 0, 1e-30
    found, scale = rounded_rows(x, codes)
    assert found.dtype == codes
    assert (scale > 0).all()
    assert torch.equal(found.double().abs().amax(-1)[:7], torch.full((7,), LARGEST[codes], dtype=torch.float64))
    step = scale if codes == torch.int8 else (x.abs() / 8).clamp(min=2**-9 * scale)  # 3 bits after the first, and below
    assert ((found.double() * scale - x).abs() <= step / 2 * (1 + 1e-6)).all()
    assert not found[7].double().any()


@on_codes
def test_a_transposed_x_is_multiplied_by_rows(codes, monkeypatch):
    """CUDA's products refuse another order; a CPU's take it."""
    x, weight, own, scale, bias = drawn(codes)
    expected = scaled_linear(x, weight, own, scale, bias)  # also asks once whether the device has such products
    strides = []
    name = "_int_mm" if codes == torch.int8 else "_scaled_mm"
    product = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda a, *rest, **kw: strides.append(a.stride()) or product(a, *rest, **kw))
    turned = x.t().contiguous().t()
    assert torch.equal(scaled_linear(turned, weight, own, scale, bias), expected)
    assert strides == [(64, 1)]


@on_codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_the_rounded_operands(codes, dtype, bias):
    """Beside float64 of the rounded operands only float32's sums and the result's rounding; beside the exact product no
    element is off by more than the operands' rounding can make it."""
    if DEVICE == "cuda" and codes != torch.int8 and dtype != torch.bfloat16:
        pytest.skip("float8 products are bfloat16 there")
    x, weight, own, scale, given = drawn(codes, dtype=dtype, bias=bias)
    found = scaled_linear(x, weight, own, scale, given).double()
    assert found.dtype == torch.float64
    same = rounded_linear(x, own, scale, given)
    slack = torch.finfo(dtype).eps * same.abs() + 1e-5 * same.abs().amax(-1, keepdim=True)
    assert ((found - same).abs() <= slack).all()
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if given is None else given.double())
    own_x, own_scale = rounded_rows(x, codes)
    of_x, of_weight = own_x.double() * own_scale, own.double() * scale
    bound = (x.double() - of_x).abs() @ weight.double().abs().T + of_x.abs() @ (weight.double() - of_weight).abs().T
    assert ((found - exact).abs() <= bound + slack).all()
    assert 1e-3 < (found - exact).norm() / exact.norm() < TYPICAL_ERROR[codes]


@on_codes
def test_shapes_and_the_reference(codes):
    x, weight, own, scale, bias = drawn(codes)
    with use_backend("reference"):
        plain = scaled_linear(x.view(3, 100, -1), weight, own, scale, bias)
    assert torch.equal(plain, torch.nn.functional.linear(x.view(3, 100, -1), weight, bias))
    found = scaled_linear(x.view(3, 100, -1), weight, own, scale, bias)
    assert torch.equal(found.flatten(0, 1), scaled_linear(x, weight, own, scale, bias))
    if codes == torch.int8:  # opcheck cannot compare float8
        torch.library.opcheck(torch.ops.llava_fast.scaled_linear.default, (x, weight, own, scale, bias))


def test_what_is_refused():
    x, weight, own, scale, bias = drawn(torch.int8)
    for wrong, what in (
        ((x[0], weight, own, scale, bias), r"x \(64,\) must be"),
        ((x, weight, own[:, :32], scale, bias), "by rounded_rows"),
        ((x, weight, own.float(), scale, bias), "by rounded_rows"),
        ((x, weight, own, scale[:, 0], bias), "by rounded_rows"),
        ((x, weight, own, scale, bias[1:]), "must be \\[48\\]"),
        ((x.bfloat16(), weight, own, scale, bias), "one dtype"),
    ):
        with pytest.raises(ValueError, match=what):
            scaled_linear(*wrong)
    with use_backend("triton"), pytest.raises(BackendError, match="does not serve"):
        scaled_linear(x, weight, own, scale, bias)
    assert "multiples of 16" in eight_bit.unfit(x, own[:40])
    assert "float64" in eight_bit.unfit(x.double(), own)


class OnCuda:
    """What `unfit` reads of a tensor on a GPU."""

    device, is_cuda = torch.device("cuda", 0), True

    def __init__(self, dtype, rows=300):
        self.dtype, self.shape = dtype, torch.Size((rows, 16))


@pytest.mark.parametrize(("capability", "codes"), [((7, 5), torch.int8), ((8, 0), torch.float8_e4m3fn)])
def test_hardware_and_torch_without_8_bit_products_are_named(monkeypatch, capability, codes):
    refusal = eight_bit.unfit_device.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    least = ".".join(map(str, eight_bit.LEAST[codes]))
    assert refusal(torch.device("cuda"), codes) == (
        f"it needs compute capability {least}, this GPU has {capability[0]}.{capability[1]}"
    )
    assert "on CUDA and on a CPU, not on meta" in refusal(torch.device("meta"), codes)
    monkeypatch.delattr(torch, "_int_mm" if codes == torch.int8 else "_scaled_mm")
    assert "has no such product here" in refusal(torch.device("cpu"), codes)
    assert "more than 16 rows" in eight_bit.unfit(OnCuda(torch.bfloat16, 16), torch.empty(16, 16).to(codes))
    assert "bfloat16, x is torch.float16" in eight_bit.unfit(OnCuda(torch.float16), torch.empty(16, 16).to(CODES[-1]))


def proven(monkeypatch, select, codes, faster, spoil=lambda out: out):
    select(LLAVA_FAST_SELECT="first-use")
    from llava_fast.ops.selection import proof

    monkeypatch.setattr(proof.Times, "is_faster", faster)
    stays = eight_bit.scaled_linear
    monkeypatch.setattr(eight_bit, "scaled_linear", lambda *args: spoil(stays(*args)))
    x, weight, own, scale, bias = drawn(codes, dtype=torch.bfloat16)
    scaled_linear(x, weight, own, scale, bias)
    (verdict,) = tables.settings().table(x.device).verdicts.values()
    with backend.noted() as calls:
        scaled_linear(x, weight, own, scale, bias)
    assert calls == [("scaled_linear", verdict.backend)]
    return verdict


@on_codes
def test_selection_takes_8_bits_only_where_they_are_right_and_faster(monkeypatch, select, codes):
    assert policy.samples.is_known("scaled_linear")
    verdict = proven(monkeypatch, select, codes, faster=True)
    assert verdict.backend == "eight_bit"
    assert 1e-3 < verdict.error < TYPICAL_ERROR[codes]


@on_codes
@pytest.mark.parametrize(("faster", "spoiled", "why"), [(False, 1, "ms, the reference"), (True, 1.1, "allowed")])
def test_a_slower_or_wrong_8_bit_product_is_refused(monkeypatch, select, codes, faster, spoiled, why):
    verdict = proven(monkeypatch, select, codes, faster, lambda out: out * spoiled)
    assert verdict.backend == "reference"
    assert why in verdict.refused["eight_bit"]


@on_codes
def test_samples_have_their_own_weights_codes(codes):
    x, weight, own, scale, bias = drawn(codes)
    args = {"x": x, "weight": weight, "codes": own, "scale": scale, "bias": bias}
    sample = samples.sample_of("scaled_linear", args)
    assert not torch.equal(sample["weight"], weight)
    expected = rounded_rows(sample["weight"], codes)
    assert torch.equal(sample["codes"].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(sample["scale"], expected[1])
