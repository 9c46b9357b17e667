"""rms_norm and its residual form: every backend against float64, transformers' module, torch.library's own checks."""

from itertools import combinations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_fast.ops import add_rms_norm, rms_norm, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.rms_norm import triton_kernels
from tests.support.kernel_checks import DEVICE, DTYPES, TOLERANCE, check_op

BACKENDS = ("reference", "triton")
EPS = 1e-5


def alone(x, weight):
    return rms_norm(x, weight, EPS)


def add_both(x, residual, weight):
    """(s, y) as one tensor: a gradient then flows to both."""
    return torch.cat(add_rms_norm(x, residual, weight, EPS), dim=-1)


def y_of_add(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)[1]


def s_of_add(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)[0]


def arguments(form, *shape, dtype=torch.float32):
    rows = [torch.randn(shape, device=DEVICE, dtype=dtype) * 2 + 1 for _ in range(1 if form is alone else 2)]
    return [*rows, torch.randn(shape[-1], device=DEVICE, dtype=dtype)]


def plain(form, args):
    """The form as its formula, in the arguments' own dtype."""
    s = args[0] if form is alone else args[0] + args[1]
    y = s / (s.square().mean(-1, keepdim=True) + EPS).sqrt() * args[-1]
    return y if form is alone else torch.cat([s, y], dim=-1)


def llama(weight, eps=EPS):
    module = LlamaRMSNorm(len(weight), eps)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    return module


named = pytest.mark.parametrize("form", [alone, add_both], ids=lambda form: form.__name__)
on_backends = pytest.mark.parametrize("backend", BACKENDS)


@named
def test_the_reference_is_the_formula(form):
    args = [t.double().requires_grad_() for t in arguments(form, 3, 5, 40)]
    found, expected = form(*args), plain(form, args)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, args, grad), torch.autograd.grad(expected, args, grad))
    args = [t[..., :3].detach().requires_grad_() for t in arguments(form, 2, 4)]
    assert torch.autograd.gradcheck(form, [t.detach().double().requires_grad_() for t in args])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32 weight"])
@on_backends
def test_rounds_as_transformers_module_does(backend, weight_dtype, dtype):
    """The same dtype, and the same values but where x / rms(x) lies between two numbers of the dtype."""
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("the interpreter's bfloat16 casts truncate")
    x, weight = arguments(alone, 50, 200, dtype=dtype)
    weight = weight.to(weight_dtype or dtype)
    expected = llama(weight)(x)
    with use_backend(backend):
        found = rms_norm(x, weight, EPS)
    assert found.dtype == expected.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert (found != expected).float().mean() < 0.005  # a wrong order of rounding changes a quarter of them


@on_backends
@named
def test_every_choice_of_what_is_trained(form, backend, poisoned):
    indices = range(len(arguments(form, 1, 1)))
    for trained in (list(chosen) for size in range(len(indices) + 1) for chosen in combinations(indices, size)):
        check_op(form, arguments(form, 19, 24), trained, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
@named
def test_dtypes(form, backend, dtype, poisoned):
    args = arguments(form, 2, 9, 72, dtype=dtype)
    check_op(form, args, list(range(len(args))), backend)


@on_backends
@named
@pytest.mark.parametrize("shape", [(1, 31), (0, 31), (577, 5), (0, 3, 8), (3, 0), (3, 3), (3, 896), (2, 1, 1152)])
def test_ragged_shapes(form, backend, shape, poisoned):
    args = arguments(form, *shape)
    check_op(form, args, list(range(len(args))), backend)


@on_backends
@named
def test_non_contiguous_arguments(form, backend, poisoned):
    args = [t.T.contiguous().T if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in arguments(form, 6, 40)]
    assert not any(t.is_contiguous() for t in args)
    check_op(form, args, list(range(len(args))), backend)
    x = args[0].detach().clone().requires_grad_()
    with use_backend(backend):
        form(x, *args[1:]).sum().backward()  # an expanded gradient
    exact = x.detach().double().cpu().requires_grad_()
    plain(form, [exact, *(t.double().cpu() for t in args[1:])]).sum().backward()
    torch.testing.assert_close(x.grad.double().cpu(), exact.grad, rtol=1e-4, atol=1e-5)


@on_backends
def test_a_result_that_nothing_uses_costs_no_gradient(backend):
    check_op(y_of_add, arguments(add_both, 7, 24), [0, 1, 2], backend)
    check_op(s_of_add, arguments(add_both, 7, 24), [0, 1], backend)
    x, residual, weight = (t.requires_grad_() for t in arguments(add_both, 7, 24))
    with use_backend(backend):
        assert torch.autograd.grad(s_of_add(x, residual, weight).sum(), weight, allow_unused=True)[0] is None


@on_backends
def test_rows_of_zeros(backend, poisoned):
    """y is 0, and its gradient is finite: the weight over sqrt(eps)."""
    args = arguments(alone, 4, 40)
    args[0][1:3] = 0
    check_op(alone, args, [0, 1], backend, tolerance=1e-5)
    with use_backend(backend):
        assert not alone(*args)[1:3].any()


@on_backends
def test_a_residual_of_another_dtype_is_promoted(backend):
    x, residual, weight = arguments(add_both, 3, 24)
    check_op(add_both, [x, residual.half(), weight], [0, 1, 2], backend, tolerance=1e-3)
    with use_backend(backend):
        s, y = add_rms_norm(x, residual.half(), weight, EPS)
    assert s.dtype == y.dtype == torch.float32


@on_backends
def test_autocast_changes_nothing(backend):
    x, weight = arguments(alone, 3, 24)
    x = x.half()
    with torch.autocast(DEVICE, torch.bfloat16), use_backend(backend):
        found = rms_norm(x, weight, EPS)
        assert found.dtype == llama(weight)(x).dtype == torch.float32


def test_sums_of_many_rows_are_exact_and_the_same_again(monkeypatch):
    """More rows than the least that a partial sum has."""
    monkeypatch.setattr(triton_kernels, "PARTS", 3)
    args = arguments(alone, 100, 24)
    check_op(alone, args, [0, 1], "triton")
    weight = args[1].requires_grad_()
    with use_backend("triton"):
        grads = [torch.autograd.grad(alone(*args).square().sum(), weight)[0] for _ in "ab"]
    assert torch.equal(*grads)


def test_what_is_kept_for_the_backward_pass():
    """x, its rstd and the weight: nothing of x's size besides x itself."""
    x, weight = (t.requires_grad_() for t in arguments(alone, 9, 24, dtype=torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert sorted(t.numel() for t in kept) == [9, 24, 9 * 24]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


@on_backends
@named
def test_torch_library_contract(form, backend):
    args = [t.requires_grad_() for t in arguments(form, 3, 24)]
    op = torch.ops.llava_fast.rms_norm.default if form is alone else torch.ops.llava_fast.add_rms_norm.default
    with use_backend(backend):
        torch.library.opcheck(op, (*args, EPS))
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*args).square().sum(), args)
        expected = torch.autograd.grad(form(*args).square().sum(), args)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@on_backends
def test_the_backwards_contract(backend):
    grad, x, weight = torch.randn(4, 24, device=DEVICE), torch.randn(4, 24, device=DEVICE), torch.randn(24).to(DEVICE)
    rstd = 1 / x.std(-1, keepdim=True)
    backward = torch.ops.llava_fast.rms_norm_backward.default
    with use_backend(backend):
        for grad_sum in (None, grad):
            for needed in ([True, True], [True, False], [False, True]):
                given = (grad, grad_sum, x, rstd, weight, needed)
                torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


def test_a_second_derivative_is_refused():
    x, weight = (t.requires_grad_() for t in arguments(alone, 3, 24))
    first = torch.autograd.grad(alone(x, weight).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="rms_norm has no second derivative"):
        first.sum().backward()


def test_what_does_not_fit_is_refused():
    x, residual, weight = arguments(add_both, 3, 24)
    with pytest.raises(ValueError, match=r"weight \(23,\) must be \[width\] for x \(3, 24\)"):
        rms_norm(x, weight[1:], EPS)
    with pytest.raises(ValueError, match="must have the same shape"):
        add_rms_norm(x, residual[1:], weight, EPS)
    with pytest.raises(ValueError, match=r"x must be floating, got torch.int32"):
        rms_norm(x.int(), weight, EPS)
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"torch.float64 is not one of"):
            rms_norm(x.double(), weight, EPS)
        wide = torch.zeros(1, 8193, device=DEVICE)
        with pytest.raises(BackendError, match="rows of 8193 values do not fit"):
            rms_norm(wide, wide[0], EPS)


@on_backends
def test_large_values_do_not_overflow_in_half_precision(backend):
    """Their squares are beyond float16's largest number."""
    x, weight = arguments(alone, 5, 64, dtype=torch.float16)
    check_op(alone, [x * 1000, weight], [0, 1], backend, tolerance=2 * TOLERANCE[torch.float16])
