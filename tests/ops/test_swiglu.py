"""swiglu: every backend against float64, transformers' MLP, torch.library's own checks."""

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops import swiglu, use_backend
from llava_fast.ops.backend import BackendError
from tests.support.kernel_checks import DEVICE, DTYPES, check_op

on_backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def arguments(*shape, dtype=torch.float32):
    return [torch.randn(shape, device=DEVICE, dtype=dtype) * 3 for _ in range(2)]


def test_the_reference_is_the_formula():
    args = [t.double().requires_grad_() for t in arguments(3, 5, 40)]
    found, expected = swiglu(*args), args[0] / (1 + (-args[0]).exp()) * args[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, args, grad), torch.autograd.grad(expected, args, grad))
    assert torch.autograd.gradcheck(swiglu, [t.double().requires_grad_() for t in arguments(2, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@on_backends
def test_rounds_as_two_steps_do(backend, dtype):
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("the interpreter's bfloat16 casts truncate")
    gate, up = arguments(50, 200, dtype=dtype)
    with use_backend(backend):
        found = swiglu(gate, up)
    expected = F.silu(gate) * up
    assert found.dtype == dtype
    if backend == "reference":
        assert torch.equal(found, expected)
    elif dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert (found != expected).float().mean() < 0.005  # a wrong order of rounding changes a quarter of them


@pytest.mark.parametrize("trained", [[], [0], [1], [0, 1]], ids=str)
@on_backends
def test_every_choice_of_what_is_trained(backend, trained, poisoned):
    check_op(swiglu, arguments(19, 24), trained, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends
def test_dtypes(backend, dtype, poisoned):
    check_op(swiglu, arguments(2, 9, 72, dtype=dtype), [0, 1], backend)


@on_backends
@pytest.mark.parametrize("shape", [(1, 31), (0, 31), (577, 31), (0, 3, 8), (3, 0), (2, 3, 1), (5, 2049), (40,)])
def test_ragged_shapes(backend, shape, poisoned):
    check_op(swiglu, arguments(*shape), [0, 1], backend)


@on_backends
def test_arguments_that_are_not_contiguous(backend, poisoned):
    both = torch.randn(2, 5, 62, device=DEVICE)
    halves, columns = both.chunk(2, dim=-1), [t.transpose(0, 2) for t in arguments(40, 3, 6)]
    for args in (halves, columns, [halves[0], halves[1].contiguous()], [t[:, :1].expand(2, 5, 31) for t in halves]):
        check_op(swiglu, list(args), [0, 1], backend)
    gate, up = (t.clone().requires_grad_() for t in halves)
    with use_backend(backend):
        found = torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))  # an expanded gradient
    torch.testing.assert_close(found, torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up)))


def test_arguments_stay_as_they_were():
    """The reference works in place, on memory of its own."""
    gate, up = (t.requires_grad_() for t in arguments(3, 24))
    before, grad = (gate.detach().clone(), up.detach().clone()), torch.randn(3, 24, device=DEVICE)
    kept = grad.clone()
    torch.autograd.grad(swiglu(gate, up), (gate, up), grad)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    assert torch.equal(grad, kept)


@on_backends
def test_large_gates(backend, poisoned):
    """silu goes to 0 or to the gate, and no exponential becomes infinite over infinite."""
    gate = torch.tensor([[-1e4, -100.0, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    check_op(swiglu, [gate, torch.ones_like(gate)], [0, 1], backend)


def test_mixed_dtypes_are_promoted_by_the_reference():
    gate, up = arguments(4, 24)
    for args in ([gate.half(), up], [gate, up.half()]):
        check_op(swiglu, args, [0, 1], "reference", tolerance=1e-3)
        assert swiglu(*args).dtype == torch.float32


def test_what_is_kept_for_the_backward_pass():
    gate, up = (t.requires_grad_() for t in arguments(9, 24))
    for trained, expected in (((gate, up), [216, 216]), ((up,), [0, 216])):
        kept = []
        args = [t if any(t is each for each in trained) else t.detach() for t in (gate, up)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            swiglu(*args)
        assert sorted(t.numel() for t in kept) == expected


@on_backends
def test_torch_library_contract(backend):
    args = [t.requires_grad_() for t in arguments(3, 24)]
    ops = torch.ops.llava_fast
    with use_backend(backend):
        torch.library.opcheck(ops.swiglu.default, tuple(args))
        for needed in ([True, True], [True, False], [False, True]):
            given = (*(t.detach() for t in (args[0], *args)), torch.float32, needed)
            torch.library.opcheck(ops.swiglu_backward.default, given, test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*args).square().sum(), args)
        expected = torch.autograd.grad(swiglu(*args).square().sum(), args)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_derivative_is_refused():
    gate, up = (t.requires_grad_() for t in arguments(3, 24))
    first = torch.autograd.grad(swiglu(gate, up).square().sum(), gate, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="swiglu has no second derivative"):
        first.sum().backward()


def test_what_does_not_fit_is_refused():
    gate, up = arguments(3, 24)
    with pytest.raises(ValueError, match=r"gate \(3, 24\) and up \(3, 23\) must have the same shape"):
        swiglu(gate, up[:, 1:])
    with pytest.raises(ValueError, match=r"must be floating, got torch.float32 and torch.int32"):
        swiglu(gate, up.int())
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"torch.float64 is not one of"):
            swiglu(gate.double(), up.double())
        with pytest.raises(BackendError, match="dtypes differ"):
            swiglu(gate, up.half())
