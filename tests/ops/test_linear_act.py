"""linear_act and the matrix product under it: against float64, gradients, ragged shapes, torch.library's own checks."""

import pytest
import torch

from llava_fast.ops import gemm, linear_act, sums, triton_support, use_backend
from llava_fast.ops.activations import ACTIVATIONS, activation_gradient
from llava_fast.ops.backend import BackendError
from tests.support.kernel_checks import DEVICE, DTYPES, TOLERANCE, check_op, relative, running

BACKENDS = ("reference", "triton")
KERNELS = ("gemm_kernel", "gemm_kernel_fp32", "weight_gradient_kernel", "weight_gradient_kernel_fp32")
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2}  # several tiles each way, and several groups


@pytest.fixture
def small_blocks():
    with triton_support.forced(dict.fromkeys(KERNELS, SMALL)):
        yield


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("trained", [[], [0], [1], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "cublas"])
def test_output_and_gradients(backend, dtype, trained, poisoned):
    args = [random(2, 9, 72, dtype=dtype), random(40, 72, dtype=dtype) / 8, random(40, dtype=dtype), "quick_gelu"]
    check_op(linear_act, args, trained, backend)


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("backend", [*BACKENDS, "cublas"])
def test_every_activation(backend, activation, poisoned):
    args = [random(30, 24), random(33, 24), random(33), activation]
    check_op(linear_act, args, [0, 1, 2], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "width", "out"), [(0, 8, 8), (1, 1, 1), (1, 33, 31), (577, 31, 33), (70, 130, 260), (1030, 16, 16)]
)
def test_ragged_shapes_without_bias(backend, rows, width, out, poisoned):
    check_op(linear_act, [random(rows, width), random(out, width), None, "gelu"], [0, 1], backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "cublas"])
def test_views_are_handled(backend, poisoned):
    args = [random(24, 30).T, random(24, 33).T, random(66)[::2], "gelu"]
    assert not any(arg.is_contiguous() for arg in args[:3])
    check_op(linear_act, args, [0, 1, 2], backend)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_activations_are_autograds(name):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1001, dtype=torch.float64)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name](x), x, grad)
    torch.testing.assert_close(activation_gradient(name, grad, x.detach()), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_for_frozen_operands(backend):
    x, weight, bias = random(6, 8), random(4, 8), random(4)
    kept = {}
    for trained in ("", "x", "weight", "bias"):
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            tensor.requires_grad_(name == trained)
        with use_backend(backend):
            out = linear_act(x, weight, bias, "gelu")
        kept[trained] = [tuple(t.shape) for t in out.grad_fn.saved_tensors] if out.grad_fn else None
    pre = (6, 4)
    assert kept == {"": None, "x": [(0,), (4, 8), pre], "weight": [(6, 8), (0,), pre], "bias": [(0,), (0,), pre]}
    out = linear_act(x, weight, bias.requires_grad_())  # without activation there is nothing to go back through
    assert [t.numel() for t in out.grad_fn.saved_tensors] == [0, 0, 0]


def test_the_cublas_form_activates_in_one_kernel(monkeypatch):
    """And where there is nothing to fuse the reference runs."""
    calls, activation = [], gemm.activation
    monkeypatch.setattr(gemm, "activation", lambda *given: calls.append(given[1]) or activation(*given))
    x, weight = random(6, 8), random(4, 8).requires_grad_()
    with running("cublas"):
        linear_act(x, weight, None, "gelu").sum().backward()
        linear_act(x, weight).sum().backward()
    assert calls == ["gelu", "gelu"]


# ---------------------------------------------------------------- the matrix product itself, in several tiles


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_and_stored_rows(dtype, transposed, small_blocks, poisoned):
    a, b, bias = random(50, 39, dtype=dtype), random(37, 39, dtype=dtype), random(37, dtype=dtype)
    gather = torch.randint(-1, 50, (75,), dtype=torch.int32, device=DEVICE)
    store = torch.randperm(90, device=DEVICE)[:75].int()
    store[::7] = -1
    out = torch.full((90, 37), 7.0, dtype=dtype, device=DEVICE)
    second = b if transposed else b.T.contiguous()
    rows = {"gather": gather, "store": store}
    gemm.gemm(a, second, 75, bias=bias, transposed=transposed, out=out, **rows)
    exact = torch.full((90, 37), 7.0, dtype=torch.float64)
    taken = torch.where(gather[:, None] >= 0, a[gather.clamp(0).long()], 0).double().cpu()
    made = taken @ b.double().cpu().T + bias.double().cpu()
    exact[store[store >= 0].long().cpu()] = made[store.cpu() >= 0]
    assert relative(out, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 16, 17, 45, 99])
def test_rows_after_the_count_are_left_as_they_were(count, dtype, small_blocks):
    """Blocks that hold none of the first `count` rows do nothing."""
    a, b = random(45, 20, dtype=dtype), random(33, 20, dtype=dtype)
    out = torch.full((45, 33), 7.0, dtype=dtype, device=DEVICE)
    counted = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    gemm.gemm(a, b, 45, out=out, count=counted)
    count = min(count, 45)
    if count:
        assert relative(out[:count], (a.double() @ b.double().T)[:count]) <= TOLERANCE[dtype]
    assert (out[count:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues(dtype, small_blocks, poisoned):
    a, b, slope = random(45, 20, dtype=dtype), random(33, 20, dtype=dtype), random(45, 33, dtype=dtype)
    pre = torch.empty(45, 33, dtype=dtype, device=DEVICE)
    out = gemm.gemm(a, b, 45, activation="gelu", pre=pre)
    product = a.double() @ b.double().T
    assert relative(pre, product) <= TOLERANCE[dtype]
    assert relative(out, ACTIVATIONS["gelu"](product)) <= TOLERANCE[dtype]
    out = gemm.gemm(a, b, 45, activation="gelu", slope=slope)
    assert relative(out, activation_gradient("gelu", product, slope.double())) <= TOLERANCE[dtype]
    hidden = gemm.activation(slope, "gelu")
    assert relative(hidden, ACTIVATIONS["gelu"](slope.double())) <= TOLERANCE[dtype]


@pytest.mark.parametrize("share", [None, 32, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_of_gathered_rows(dtype, share, small_blocks, poisoned):
    grad, x = random(60, 33, dtype=dtype), random(50, 31, dtype=dtype)
    grad_gather, x_gather = (torch.randint(-1, n, (130,), dtype=torch.int32, device=DEVICE) for n in (60, 50))
    rows = {"grad_gather": grad_gather, "x_gather": x_gather}
    found = [gemm.weight_gradient(grad, x, 130, **rows, share=share) for _ in "ab"]
    taken = [
        torch.where(index[:, None] >= 0, table[index.clamp(0).long()], 0).double()
        for table, index in ((grad, grad_gather), (x, x_gather))
    ]
    assert relative(found[0], taken[0].T @ taken[1]) <= TOLERANCE[dtype]
    assert torch.equal(*found)
    assert relative(sums.sum_rows(grad, 130, grad_gather), taken[0].sum(0)) <= TOLERANCE[dtype]


def test_a_weight_gradient_of_many_rows_is_shared_out_the_same_way_each_time(poisoned):
    grad, x = random(3000, 16), random(3000, 16)
    found = [gemm.weight_gradient(grad, x, 3000) for _ in "ab"]
    assert relative(found[0], grad.double().T @ x.double()) <= 2e-6
    assert torch.equal(*found)


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_torch_library_contract(backend, activation):
    args = [random(2, 5, 8), random(6, 8), random(6)]
    args = [arg.requires_grad_() for arg in args]
    with use_backend(backend):
        torch.library.opcheck(torch.ops.llava_fast.linear_act.default, (*args, activation, bool(activation)))
        compiled = torch.compile(linear_act, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*args, activation).square().sum(), args)
        expected = torch.autograd.grad(linear_act(*args, activation).square().sum(), args)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["", "gelu"])
def test_the_backwards_contract(backend, activation):
    """Empty tensors stand for what the forward pass did not keep."""
    grad, x, weight, pre = random(2, 5, 6), random(2, 5, 8), random(6, 8), random(2, 5, 6)
    backward = torch.ops.llava_fast.linear_act_backward.default
    with use_backend(backend):
        for needed in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
            kept = (x if needed[1] else x.new_empty(0), weight if needed[0] else x.new_empty(0))
            given = (grad, *kept, pre if activation else pre.new_empty(0), activation, needed)
            torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


def test_arguments_are_checked():
    x, weight, bias = random(3, 8), random(4, 8), random(4)
    with pytest.raises(ValueError, match=r"weight \(4, 7\)"):
        linear_act(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"bias \(3,\) must be \[4\]"):
        linear_act(x, weight, bias[:3])
    with pytest.raises(ValueError, match="unknown activation 'gelu_new'"):
        linear_act(x, weight, bias, "gelu_new")
    with use_backend("triton"), pytest.raises(BackendError, match="dtypes differ"):
        linear_act(x, weight.half())
