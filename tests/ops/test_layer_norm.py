"""layer_norm and its fused forms: every backend against the reference in float64, torch.library's own checks."""

from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops import add_layer_norm, double_layer_norm, layer_norm, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.layer_norm import triton_kernels
from tests.support.kernel_checks import DEVICE, DTYPES, TOLERANCE, check_op, relative

BACKENDS = ("reference", "triton")
EPS = 1e-5


def both(results):
    """(s, y) as one tensor: a gradient then flows to both."""
    return torch.cat(results, dim=-1)


def add_both(x, residual, weight, bias):
    return both(add_layer_norm(x, residual, weight, bias, EPS))


def double_both(x, pre_weight, pre_bias, weight, bias):
    return both(double_layer_norm(x, pre_weight, pre_bias, 1e-3, weight, bias, EPS))


def alone(x, weight, bias):
    return layer_norm(x, weight, bias, EPS)


def y_of_add(x, residual, weight, bias):
    return add_layer_norm(x, residual, weight, bias, EPS)[1]


def s_of_double(x, pre_weight, pre_bias, weight, bias):
    return double_layer_norm(x, pre_weight, pre_bias, EPS, weight, bias, EPS)[0]


FORMS = {alone: (1, 2), add_both: (2, 2), double_both: (1, 4)}  # how many of rows and of parameters it takes


def arguments(form, *shape, dtype=torch.float32):
    rows, parameters = FORMS[form]
    return [
        *(torch.randn(shape, device=DEVICE, dtype=dtype) * 2 + 1 for _ in range(rows)),
        *(torch.randn(shape[-1], device=DEVICE, dtype=dtype) for _ in range(parameters)),
    ]


def subsets(form):
    indices = range(sum(FORMS[form]))
    return [list(chosen) for size in range(len(indices) + 1) for chosen in combinations(indices, size)]


named = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
on_backends = pytest.mark.parametrize("backend", BACKENDS)


def plain(form, args):
    """The form as PyTorch's own ops."""
    x, *rest = args
    width = x.shape[-1:]
    if form is alone:
        return F.layer_norm(x, width, *rest, EPS)
    s = x + rest[0] if form is add_both else F.layer_norm(x, width, *rest[:2], 1e-3)
    return both([s, F.layer_norm(s, width, *rest[-2:], EPS)])


@named
def test_the_reference_is_pytorchs_layer_norm(form):
    args = [t.double().requires_grad_() for t in arguments(form, 3, 5, 40)]
    found, expected = form(*args), plain(form, args)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, args, grad), torch.autograd.grad(expected, args, grad))
    args = [t[..., :3].detach().requires_grad_() for t in arguments(form, 2, 4)]
    assert torch.autograd.gradcheck(form, [t.detach().double().requires_grad_() for t in args])


@on_backends
@named
def test_every_choice_of_what_is_trained(form, backend, poisoned):
    for trained in subsets(form):
        check_op(form, arguments(form, 19, 24), trained, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
@named
def test_dtypes(form, backend, dtype, poisoned):
    args = arguments(form, 2, 9, 72, dtype=dtype)
    check_op(form, args, list(range(len(args))), backend)


@on_backends
@named
@pytest.mark.parametrize("shape", [(1, 31), (0, 31), (577, 31), (0, 3, 8), (3, 1024), (2, 1, 1152), (3, 1280)])
def test_ragged_shapes(form, backend, shape, poisoned):
    args = arguments(form, *shape)
    check_op(form, args, list(range(len(args))), backend)


@on_backends
@named
def test_non_contiguous_arguments(form, backend, poisoned):
    rows, _ = FORMS[form]
    args = arguments(form, 6, 40)
    args = [t.T.contiguous().T if i < rows else t.repeat_interleave(2)[::2] for i, t in enumerate(args)]
    assert not any(t.is_contiguous() for t in args)
    check_op(form, args, list(range(len(args))), backend)
    x = args[0].detach().clone().requires_grad_()
    with use_backend(backend):
        form(x, *args[1:]).sum().backward()  # an expanded gradient
    exact = x.detach().double().cpu().requires_grad_()
    plain(form, [exact, *(t.double().cpu() for t in args[1:])]).sum().backward()
    torch.testing.assert_close(x.grad.double().cpu(), exact.grad, rtol=1e-4, atol=1e-5)


@on_backends
@pytest.mark.parametrize("form", [y_of_add, s_of_double])
def test_a_result_that_nothing_uses_costs_no_gradient(form, backend):
    args = arguments({y_of_add: add_both, s_of_double: double_both}[form], 7, 24)
    check_op(form, args, [0, 1, 2], backend)
    if form is s_of_double:
        args[-2].requires_grad_()
        with use_backend(backend):
            unused = torch.autograd.grad(form(*args).sum(), args[-2], allow_unused=True)[0]
        assert unused is None


@on_backends
@named
def test_constant_rows(form, backend, poisoned):
    """Variance 0: y is the bias, and nothing is infinite."""
    args = arguments(form, 4, 40)
    for rows in args[: FORMS[form][0]]:
        rows[1:3] = 3.0
    check_op(form, args, list(range(len(args))), backend, tolerance=2e-5)
    with use_backend(backend):
        torch.testing.assert_close(layer_norm(args[0], *args[-2:], EPS)[1], args[-1], rtol=1e-4, atol=1e-4)


@on_backends
@named
def test_rows_far_from_zero(form, backend):
    """A mean of 1000 costs its rounding (6e-5 of a unit), not the variance, as E[x^2] - E[x]^2 would."""
    args = arguments(form, 5, 1024)
    args[0] += 1000
    check_op(form, args, list(range(len(args))), backend, tolerance=3e-4)
    with use_backend(backend):
        found = form(*args)
    exact, theirs = form(*(t.double().cpu() for t in args)), plain(form, args)
    assert relative(found, exact) <= 2 * relative(theirs, exact) + TOLERANCE[torch.float32]


@on_backends
def test_a_residual_of_another_dtype_is_promoted(backend):
    x, residual, weight, bias = arguments(add_both, 3, 24)
    check_op(add_both, [x, residual.half(), weight, bias], [0, 1, 2, 3], backend, tolerance=1e-3)
    with use_backend(backend):
        s, y = add_layer_norm(x, residual.half(), weight, bias, EPS)
    assert s.dtype == y.dtype == torch.float32


def test_sums_of_many_rows_are_exact_and_the_same_again(monkeypatch):
    """More rows than the least that a partial sum has."""
    monkeypatch.setattr(triton_kernels, "PARTS", 3)
    args = arguments(alone, 100, 24)
    check_op(alone, args, [0, 1, 2], "triton")
    weight = args[1].requires_grad_()
    with use_backend("triton"):
        grads = [torch.autograd.grad(alone(*args).square().sum(), weight)[0] for _ in "ab"]
    assert torch.equal(*grads)


@on_backends
@named
def test_torch_library_contract(form, backend):
    args = [t.requires_grad_() for t in arguments(form, 3, 24)]
    ops = torch.ops.llava_fast
    with use_backend(backend):
        if form is alone:
            torch.library.opcheck(ops.layer_norm.default, (*args, EPS))
        elif form is add_both:
            torch.library.opcheck(ops.add_layer_norm.default, (*args, EPS))
        else:
            torch.library.opcheck(ops.double_layer_norm.default, (*args[:3], EPS, *args[3:], EPS))
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*args).square().sum(), args)
        expected = torch.autograd.grad(form(*args).square().sum(), args)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@on_backends
def test_the_backwards_contract(backend):
    grad, x = torch.randn(4, 24, device=DEVICE), torch.randn(4, 24, device=DEVICE)
    mean, rstd, weight = x.mean(-1, keepdim=True), 1 / x.std(-1, keepdim=True), torch.randn(24, device=DEVICE)
    backward = torch.ops.llava_fast.layer_norm_backward.default
    checks = ("test_schema", "test_faketensor")
    with use_backend(backend):
        for needed in ([True, True, True], [True, False, False], [False, True, False]):
            torch.library.opcheck(backward, (grad, grad, x, mean, rstd, weight, needed), test_utils=checks)
        torch.library.opcheck(backward, (grad, None, None, None, None, weight, [False, False, True]), test_utils=checks)


@named
def test_autocast_runs_in_float32(form):
    args = arguments(form, 3, 24)
    low = [args[0].bfloat16(), *args[1:]]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = form(*low)
    assert found.dtype == torch.float32
    assert torch.equal(found, form(low[0].float(), *args[1:]))


def test_what_does_not_fit_is_refused():
    x, residual, weight, bias = arguments(add_both, 3, 24)
    with pytest.raises(ValueError, match=r"weight \(23,\) and bias \(24,\) must both be \[width\]"):
        layer_norm(x, weight[1:], bias, EPS)
    with pytest.raises(ValueError, match="must have the same shape"):
        add_layer_norm(x, residual[1:], weight, bias, EPS)
    with pytest.raises(ValueError, match=r"x must be floating, got torch.int32"):
        layer_norm(x.int(), weight, bias, EPS)
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"torch.float64 is not one of"):
            layer_norm(x.double(), weight, bias, EPS)
        wide = torch.zeros(1, 4097, device=DEVICE)
        with pytest.raises(BackendError, match="rows of 4097 values do not fit"):
            layer_norm(wide, wide[0], wide[0], EPS)
