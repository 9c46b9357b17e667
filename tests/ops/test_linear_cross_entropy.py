"""linear_cross_entropy against PyTorch's own loss and in float64; chunks, gradients, torch.library's own checks."""

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops import linear_cross_entropy, use_backend
from llava_fast.ops.linear_cross_entropy import chunked
from tests.support.kernel_checks import DEVICE, check_op

BACKENDS = ("reference", "native")
VOCABULARY, WIDTH = 37, 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name in ("CHUNK_BYTES", "CPU_CHUNK_BYTES"):
        monkeypatch.setattr(chunked, name, 23 * 16 * 4)  # three parts for 23 rows of float32
    monkeypatch.setattr(chunked, "LEAST_COLUMNS", 10)  # four for 64 rows


def inputs(rows, dtype=torch.float32, bias=True):
    hidden, weight = torch.randn(rows, WIDTH, dtype=dtype), torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    target = torch.randint(0, VOCABULARY, (rows,), dtype=torch.int32)
    made = [hidden, weight, target, torch.randn(VOCABULARY, dtype=dtype) if bias else None]
    return [None if t is None else t.to(DEVICE) for t in made]


@pytest.mark.parametrize("trained", [[], [0], [1], [3], [0, 1, 3]], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 23])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients(backend, rows, trained, poisoned):
    check_op(linear_cross_entropy, inputs(rows), trained, backend, tolerance=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_usual_loss(backend):
    hidden, weight, target, _ = inputs(11, bias=False)
    with use_backend(backend):
        found = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, target.long(), reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_at_most_twice_as_wrong_as_pytorch(backend):
    hidden, weight, target, _ = inputs(64, torch.bfloat16, bias=False)
    leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    exact_leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    plain_leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
    with use_backend(backend):
        linear_cross_entropy(*leaves, target).mean().backward()
    F.cross_entropy(exact_leaves[0] @ exact_leaves[1].T, target.long()).backward()
    F.cross_entropy((plain_leaves[0] @ plain_leaves[1].T).float(), target.long()).backward()
    for mine, plain, exact in zip(leaves, plain_leaves, exact_leaves, strict=True):
        error, usual = ((t.grad.double() - exact.grad).norm() for t in (mine, plain))
        assert error <= 2 * usual


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden, weight, target, bias = inputs(0)
    hidden.requires_grad_(), weight.requires_grad_()
    with use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, target, bias)
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert loss.shape == (0,)
    assert gradients[0].shape == hidden.shape
    assert not gradients[1].any()


def test_the_table_of_logits_never_exists(monkeypatch):
    shapes = []
    whole = chunked.wide_logits
    monkeypatch.setattr(chunked, "wide_logits", lambda *a: shapes.append((len(a[0]), len(a[1]))) or whole(*a))
    hidden, weight, target, bias = inputs(23)
    with use_backend("native"):
        linear_cross_entropy(hidden.requires_grad_(), weight, target, bias).sum().backward()
        assert shapes == 2 * [(23, 13), (23, 13), (23, 11)]
        shapes.clear()
        linear_cross_entropy(*inputs(1000, bias=False)[:3])
    assert set(shapes) == {(1000, 10), (1000, 7)}  # no thinner than LEAST_COLUMNS


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_library_contract(backend):
    hidden, weight, target, bias = inputs(7)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), target, bias.requires_grad_())
    with use_backend(backend):
        torch.library.opcheck(torch.ops.llava_fast.linear_cross_entropy.default, leaves)
        compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*leaves), linear_cross_entropy(*leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backwards_contract(backend):
    hidden, weight, target, bias = inputs(7)
    grad, denominator = torch.randn(7, device=DEVICE), (hidden @ weight.T + bias).logsumexp(1)
    backward = torch.ops.llava_fast.linear_cross_entropy_backward.default
    with use_backend(backend):
        for needed in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
            given = (grad, hidden, weight, target, bias, denominator, needed)
            torch.library.opcheck(backward, given, test_utils=("test_schema", "test_faketensor"))


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, target, bias = inputs(7)
    for args in ((hidden[0], weight, target), (hidden, weight, target[:3]), (hidden, weight[:, :3], target)):
        with pytest.raises(ValueError, match="must be"):
            linear_cross_entropy(*args)
    with pytest.raises(ValueError, match="vocabulary"):
        linear_cross_entropy(hidden, weight, target, bias[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_views_lie_as_the_fake_kernel_says(backend):
    hidden, weight, target, _ = inputs(7, bias=False)
    view = hidden.T.contiguous().T.requires_grad_()
    assert not view.is_contiguous()
    with use_backend(backend):
        loss = linear_cross_entropy(view, weight, target)
        op = torch.ops.llava_fast.linear_cross_entropy_backward.default
        given = (loss.detach(), view.detach(), weight, target, None, loss.detach(), [True, True, False])
        torch.library.opcheck(op, given, test_utils="test_faketensor")
