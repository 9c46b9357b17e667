"""mix_rows: every backend against the reference in float64, gradients, torch.library's own checks."""

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops import mix_rows, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.mix_rows import InversePooling, reference
from tests.support.kernel_checks import DEVICE, DTYPES, check_op

BACKENDS = ("reference", "triton")


def table(mixed: int, taps: int, rows: int):
    """A random table with repeated and unused rows, its weights, and its inverse."""
    index = torch.randint(0, max(rows - 1, 1), (mixed, taps), dtype=torch.int32)
    use = torch.argsort(index.flatten(), stable=True).int()
    start = torch.cat([torch.zeros(1), torch.bincount(index.flatten(), minlength=rows).cumsum(0)]).int()
    return index.to(DEVICE), torch.rand(mixed, taps, device=DEVICE), InversePooling(use.to(DEVICE), start.to(DEVICE))


def mix(rows, index, weight, reduce, inverse):
    """mix_rows with weights in float32, which check_op gives in float64."""
    return mix_rows(rows, index, weight.float(), reduce, inverse)


def every_second(tensor):
    """The same values in a strided view."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("trained", [[], [0]], ids=str)
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_gradients(backend, dtype, reduce, trained, poisoned):
    index, weight, inverse = table(30, 4, 20)
    rows = torch.randn(20, 72, device=DEVICE).to(dtype)
    check_op(mix, [rows, index, weight, reduce, inverse], trained, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mixed", "taps", "rows", "width"), [(1, 1, 1, 1), (0, 4, 5, 8), (577, 4, 100, 3), (6, 9, 7, 1030)]
)
def test_ragged_shapes(backend, mixed, taps, rows, width, poisoned):
    index, weight, inverse = table(mixed, taps, rows)
    for reduce in ("sum", "max"):
        check_op(mix, [torch.randn(rows, width, device=DEVICE), index, weight, reduce, inverse], [0], backend)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_handled(backend, reduce, poisoned):
    index, weight, inverse = table(15, 4, 10)
    rows = torch.randn(24, 10, device=DEVICE).T
    index, weight, inverse = every_second(index), weight.T.contiguous().T, InversePooling(*map(every_second, inverse))
    assert not any(tensor.is_contiguous() for tensor in (rows, index, weight, *inverse))
    check_op(mix, [rows, index, weight, reduce, inverse], [0], backend)
    leaf = rows.detach().requires_grad_()
    with use_backend(backend):
        mix_rows(leaf, index, weight, reduce, inverse).sum().backward()  # an expanded gradient
    plain = rows.detach().requires_grad_()
    reference.mix_rows(plain, index, weight, reduce).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_maximum_of_equals_sends_its_gradient_to_the_first_as_max_pooling_does(backend):
    side, width = 4, 3
    rows = torch.randint(0, 2, (side * side, width)).float().to(DEVICE).requires_grad_()
    index = torch.arange(side * side).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4).int().to(DEVICE)
    order = torch.argsort(index.flatten(), stable=True).int()
    inverse = InversePooling(order, torch.arange(side * side + 1, dtype=torch.int32, device=DEVICE))
    with use_backend(backend):
        out = mix_rows(rows, index, torch.ones(4, 4, device=DEVICE), "max", inverse)
    grad = torch.randn(4, width, device=DEVICE)
    picture = rows.detach().T.reshape(1, width, side, side).requires_grad_()
    pooled = F.max_pool2d(picture, 2).flatten(2)[0].T
    assert torch.equal(out, pooled)
    with use_backend(backend):
        found = torch.autograd.grad(out, rows, grad)[0]
    expected = torch.autograd.grad(pooled, picture, grad)[0].flatten(2)[0].T
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_library_contract(backend, reduce):
    index, weight, inverse = table(5, 4, 6)
    rows = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.llava_fast.mix_rows.default, (rows, index, weight, reduce, list(inverse)))
        out = torch.compile(mix_rows, fullgraph=True, backend="aot_eager")(rows, index, weight, reduce, inverse)
        found = torch.autograd.grad(out.square().sum(), rows)
        expected = torch.autograd.grad(mix_rows(rows, index, weight, reduce, inverse).square().sum(), rows)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backwards_contract(backend, reduce):
    index, weight, inverse = table(5, 4, 6)
    rows, grad = torch.randn(6, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    saved = rows if reduce == "max" else rows[:0]  # what the forward pass keeps
    backward = torch.ops.llava_fast.mix_rows_backward.default
    with use_backend(backend):
        given = (grad, saved, index, weight, reduce, 6, list(inverse))
        torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused():
    index, weight, inverse = table(5, 4, 6)
    rows = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    with use_backend("triton"), pytest.raises(BackendError, match="no `inverse` was given"):
        mix_rows(rows, index, weight).sum().backward()
    with pytest.raises(ValueError, match="inverse covers 6 rows"):
        mix_rows(rows[:5], index, weight, "sum", inverse)
